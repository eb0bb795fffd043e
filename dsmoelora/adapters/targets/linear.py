"""What counts as a linear layer: torch's `nn.Linear`, ours in 4 bits, and the transposed `Conv1D` of GPT-2."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dsmoelora.adapters.four_bit import FrozenLinear4bit

Linear = nn.Linear | Conv1D


def is_linear(module: nn.Module | None) -> TypeGuard[Linear]:
    """Whether the module maps (T, D) to (T, O) with one weight that nobody but itself reads.

    Other subclasses of `nn.Linear` with a forward pass of their own are something else: routers that return tuples,
    layers with weights that others have quantised. torch's multi-head attention reads the weight of its output layer
    without calling it.
    """
    if isinstance(module, Conv1D | FrozenLinear4bit):
        return True
    ours = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return ours and not isinstance(module, NonDynamicallyQuantizableLinear)


def features(module: Linear) -> tuple[int, int]:
    """D and O; from the module's own fields, for ZeRO-3 empties the shape of a weight (`Conv1D` keeps it as (D, O))."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


def weight_of(module: Linear) -> Tensor:
    """The weight as (O, D), sharing its memory; `Conv1D` keeps it the other way round."""
    return module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().t()
