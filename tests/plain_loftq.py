"""LoftQ for a layer with several experts, written from its formula: bitsandbytes' own functions and numpy's SVD."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class PlainLoftq:
    """What comes of a weight.

    Args:
        kept_OD: what it is after packing
        lost_OD: what that lacks
        parts_EOD: what each expert of a token adds to it, times its gate and K
    """

    kept_OD: Tensor
    lost_OD: Tensor
    parts_EOD: Tensor


def plain_loftq(weight_OD: Tensor, num_experts: int, num_used: int, rank: int, iterations: int) -> PlainLoftq:
    """Alternate packing and decomposing; the n-th singular value goes to expert n mod E."""
    shift_OD, weight_OD = torch.zeros_like(weight_OD, dtype=torch.float64), weight_OD.double()
    for _ in range(iterations):
        kept_OD = rounded((weight_OD - shift_OD).float()).double()
        lost_OD = weight_OD - kept_OD
        u, singular, v = np.linalg.svd(lost_OD.numpy(), full_matrices=False)
        ones = [torch.from_numpy(singular[n] * np.outer(u[:, n], v[n])) for n in range(num_experts * rank)]
        parts_EOD = torch.stack([sum(ones[e::num_experts], torch.zeros_like(lost_OD)) for e in range(num_experts)])
        shift_OD = num_used / num_experts * parts_EOD.sum(0)
    return PlainLoftq(kept_OD, lost_OD, parts_EOD)


def rounded(weight_OD: Tensor) -> Tensor:
    """The weight after four bits."""
    from bitsandbytes import functional

    code, state = functional.quantize_4bit(weight_OD.contiguous(), blocksize=64, quant_type="nf4")
    weight: Tensor = functional.dequantize_4bit(code, state)
    return weight.view_as(weight_OD)
