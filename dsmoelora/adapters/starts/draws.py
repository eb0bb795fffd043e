"""What the factors of experts start from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsmoelora.config import InitName
from dsmoelora.config.adapter_options import MixerInit
from dsmoelora.seeds import empty_start, generator


def drawn(
    key: tuple[int, str, str], experts: range, num_rows: int, rank: int, draw: Callable[[Tensor, torch.Generator], None]
) -> Tensor:
    """(L, num_rows, R) fp32 on the CPU: one factor of each of these experts.

    Args:
        key: seed, layer and factor, with which the expert's number decides what is drawn
        experts: L of them
        num_rows: of the factor of one expert
        rank: R
        draw: fills one expert's factor
    """
    start_LXR = empty_start((len(experts), num_rows, rank))
    for expert, start_XR in zip(experts, start_LXR, strict=True):
        draw(start_XR, generator(*key, expert))
    return start_LXR


def draw_a(a_DR: Tensor, rng: torch.Generator, init: InitName = "kaiming") -> None:
    """Fill the factor `a` (D, R) of one expert, fp32, with its starting values, as PEFT fills its A (R, D).

    `kaiming` is uniform in +-1/sqrt(D) (`kaiming_uniform_(a=sqrt(5))`, PEFT's default), `gaussian` is normal with
    standard deviation 1/R (PEFT's `init_lora_weights="gaussian"`). With `svd`, `gradient` and `loftq` it is 0 until the
    module of that name in `starts` fills it.
    """
    in_features, rank = a_DR.shape
    if init in ("svd", "gradient", "loftq"):
        a_DR.zero_()
    elif init == "gaussian":
        a_DR.normal_(std=1 / rank, generator=rng)
    else:
        bound = in_features**-0.5
        a_DR.uniform_(-bound, bound, generator=rng)


def draw_b(b_OR: Tensor, rng: torch.Generator, init: InitName) -> None:
    """Fill the factor `b` (O, R) of one expert, fp32: 0, or with `gradient` normal with columns of length 1."""
    if init == "gradient":
        b_OR.normal_(std=b_OR.shape[0] ** -0.5, generator=rng)
    else:
        b_OR.zero_()


def draw_m(m_RR: Tensor, rng: torch.Generator, init: MixerInit | None) -> None:
    """Fill the mixer of one expert: uniform in +-1/sqrt(R) as `a` (`kaiming`), or a random `orthogonal` matrix."""
    if init == "orthogonal":
        nn.init.orthogonal_(m_RR, generator=rng)
    else:
        draw_a(m_RR, rng)
