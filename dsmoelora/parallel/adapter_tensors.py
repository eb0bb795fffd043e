"""What goes into an adapter folder, from a model that ZeRO and expert parallelism have cut into pieces."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.folder import fingerprint, fingerprinted_layers, router_buffers
from dsmoelora.optim.rows import trainables
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.factors import of_all_experts
from dsmoelora.parallel.layout import ExpertLayout


def fingerprints(model: nn.Module) -> dict[str, Any]:
    """`fingerprint` of each of `fingerprinted_layers`, on every rank (collective); before anything shifts the base."""
    layers, prints = dict(adapted_layers(model)), {}
    for name in fingerprinted_layers(model):
        base = layers[name].base
        with zero.gathered(base.parameters()):
            prints[name] = fingerprint(base.weight)
    return prints


def tensors_on_rank_0(model: nn.Module, layout: ExpertLayout) -> dict[str, Tensor]:
    """All that was trained, whole and on the CPU, on rank 0; on the others what routers keep alone (collective)."""
    tensors = {}
    for trainable, parameter in trainables(model):
        with zero.gathered([parameter]):
            whole = of_all_experts(parameter.detach(), trainable.shape[0], layout)
            if comm.rank() == 0:
                tensors[trainable.name] = whole.to("cpu", copy=True)
    return tensors | {name: buffer.to("cpu", copy=True) for name, buffer in router_buffers(model).items()}
