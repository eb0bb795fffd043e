"""What goes into an adapter folder, from a model that ZeRO and expert parallelism have cut into pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.fingerprint import NUM_VALUES, described, places
from dsmoelora.adapters.folder import router_buffers
from dsmoelora.adapters.four_bit import FrozenLinear4bit, packed_layers
from dsmoelora.optim.rows import adapter_tensors
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.factors import of_all_experts
from dsmoelora.parallel.pieces import numbers_at
from dsmoelora.parallel.placement import ExpertPlacement


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """`adapters.fingerprint.fingerprint` of a model that is not adapted yet, on every rank (collective)."""
    packed = packed_layers(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if zero.full_numel(parameter)]
    whole = [(name, parameter) for name, parameter in named if name not in packed]
    parameters = [parameter for _, parameter in whole]
    found = numbers_at(parameters, [places(zero.full_numel(parameter)) for parameter in parameters])
    values = dict(zip((name for name, _ in whole), found, strict=True)) | _read_on_rank_0(packed)
    shapes = [(name, packed[name].shape if name in packed else zero.full_shape(one)) for name, one in named]
    is_fp16 = any(parameter.dtype == torch.float16 for parameter in parameters)
    return described(shapes, [values[name] for name, _ in named], is_fp16)


def _read_on_rank_0(packed: Mapping[str, FrozenLinear4bit]) -> dict[str, Tensor]:
    """What packed weights were before: under ZeRO-3 rank 0 alone has read them (collective)."""
    if not packed:
        return {}
    nothing = torch.zeros(NUM_VALUES)
    known = [nothing if layer.as_read is None else layer.as_read for layer in packed.values()]
    return dict(zip(packed, comm.broadcast_tensor(torch.stack(known)), strict=True))


def tensors_on_rank_0(model: nn.Module, placement: ExpertPlacement) -> dict[str, Tensor]:
    """The adapters, whole and on the CPU, on rank 0; on the others what routers keep alone (collective)."""
    tensors = {}
    for trainable, parameter in adapter_tensors(model):
        with zero.gathered([parameter]):
            whole = of_all_experts(parameter.detach(), trainable.shape[0], placement)
            if comm.rank() == 0:
                tensors[trainable.name] = whole.to("cpu", copy=True)
    return tensors | {name: buffer.to("cpu", copy=True) for name, buffer in router_buffers(model).items()}
