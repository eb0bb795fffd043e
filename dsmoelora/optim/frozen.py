"""What the preconditioner needs of factors that are not trained: their Gram matrices, which never change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.optim.rows import Trainable

# By layer and role, (L, R, R) fp32 for the experts that lie here.
FrozenGrams = dict[tuple[str, Factor], Tensor]


@torch.no_grad()
def frozen_grams(
    frozen: Iterable[tuple[Trainable, nn.Parameter]],
    gathered: Callable[[Iterable[Any]], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> FrozenGrams:
    """`a^T a` and `b^T b` of the factors `a` and `b` that `adapter.freeze` names, one layer after the other.

    Args:
        frozen: tensors that are not trained
        gathered: makes parameters whole for the time of a block
    """
    found: FrozenGrams = {}
    for tensor, parameter in frozen:
        if tensor.factor in (Factor.A, Factor.B):
            with gathered([parameter]):
                factor_LXR = parameter.detach().float()
                found[tensor.layer, tensor.factor] = torch.bmm(factor_LXR.mT, factor_LXR)
    return found
