"""In which dtype a layer computes, where its input, its base and its adapter are of different ones.

That of the input, or of `torch.autocast` where it is on: everything takes it at the door of a layer, and gradients go
back in the dtypes of the parameters. Where all are of one dtype, as under the engine, nothing is converted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

from dsmoelora.adapters.four_bit import FrozenLinear4bit
from dsmoelora.adapters.targets.linear import Linear


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of a layer with this input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _is_on(device) else x.dtype


@overload
def typed(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def typed(tensor: None, like: Tensor) -> None: ...
def typed(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor in the dtype of another one; itself where it has it already, and where there is none."""
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside the block every operation computes in the dtypes of its inputs."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


def of_base(base: Linear, x: Tensor) -> Tensor:
    """What a frozen layer says, in the dtype of `x`, whatever its weight is of."""
    if base.weight.dtype == x.dtype or isinstance(base, FrozenLinear4bit):  # which is unpacked to the dtype of x
        return base(x)
    with torch.autocast(x.device.type, dtype=x.dtype):
        return base(x)


def _is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
