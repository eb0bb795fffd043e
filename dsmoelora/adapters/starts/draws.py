"""What the factors of an expert start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoelora.config import InitName
from dsmoelora.config.adapter_options import MixerInit


def draw_a(a_DR: Tensor, init: InitName, rng: torch.Generator) -> None:
    """Fill the factor `a` (D, R) of one expert, fp32, with its starting values, as PEFT fills its A (R, D).

    `kaiming` is uniform in +-1/sqrt(D) (`kaiming_uniform_(a=sqrt(5))`, PEFT's default), `gaussian` is normal with
    standard deviation 1/R (PEFT's `init_lora_weights="gaussian"`). With `svd` it is 0 until `svd_start` fills it.
    """
    in_features, rank = a_DR.shape
    if init == "svd":
        a_DR.zero_()
    elif init == "gaussian":
        a_DR.normal_(std=1 / rank, generator=rng)
    else:
        bound = in_features**-0.5
        a_DR.uniform_(-bound, bound, generator=rng)


def draw_m(m_RR: Tensor, init: MixerInit | None, rng: torch.Generator) -> None:
    """Fill the mixer of one expert: uniform in +-1/sqrt(R) as `a` (`kaiming`), or a random `orthogonal` matrix."""
    if init == "orthogonal":
        nn.init.orthogonal_(m_RR, generator=rng)
    else:
        draw_a(m_RR, "kaiming", rng)
