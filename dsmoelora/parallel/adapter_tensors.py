"""What goes into an adapter folder, from a model that ZeRO and expert parallelism have cut into pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.fingerprint import described, places
from dsmoelora.adapters.folder import router_buffers
from dsmoelora.optim.rows import adapter_tensors
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.factors import of_all_experts
from dsmoelora.parallel.layout import ExpertLayout


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """`adapters.base.fingerprint` of a model that is not adapted yet, on every rank (collective)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if zero.full_numel(parameter)]
    parameters = [parameter for _, parameter in named]
    values = zero.numbers_at(parameters, [places(zero.full_numel(parameter)) for parameter in parameters])
    shapes = [(name, zero.full_shape(parameter)) for name, parameter in named]
    return described(shapes, values, any(parameter.dtype == torch.float16 for parameter in parameters))


def tensors_on_rank_0(model: nn.Module, layout: ExpertLayout) -> dict[str, Tensor]:
    """The adapters, whole and on the CPU, on rank 0; on the others what routers keep alone (collective)."""
    tensors = {}
    for trainable, parameter in adapter_tensors(model):
        with zero.gathered([parameter]):
            whole = of_all_experts(parameter.detach(), trainable.shape[0], layout)
            if comm.rank() == 0:
                tensors[trainable.name] = whole.to("cpu", copy=True)
    return tensors | {name: buffer.to("cpu", copy=True) for name, buffer in router_buffers(model).items()}
