"""Experts that start from what packing a weight into 4 bits has lost of it: LoftQ, Li et al. 2023 (arXiv 2310.08659).

    Q_t = q(W0 - shift_{t-1})         shift_t = (s / E) sum_e b_e a_e^T,  shift_0 = 0
    U S V^T = the E R largest singular values of  W0 - Q_t, with their vectors
    a_e = V_e sqrt(K S_e / s)         b_e = U_e sqrt(K S_e / s)         so that  s b_e a_e^T = K U_e S_e V_e^T

q packs and unpacks. The weight that is packed in the end is `W0 - shift_{T-1}`, and the experts start from the factors
of iteration T. Expert e owns the singular values e, E + e, 2 E + e, ...: dealt out like cards, so that all weigh about
the same. For E = 1 this is the paper's rule, and PEFT's.

A token that uses K experts with gates 1 / K gets the directions of these, at their full length, and none of the others.
Among all scales of the experts, K is the one with which the expected squared error is least where the K experts are any
of the E: `|W0 - Q|^2 - (K / E) sum S^2`. With the scale E the mean over all tokens would be the whole `U S V^T`, but
each token would be off by more than it gains as soon as K is below E / 2.

Everything is computed in fp64, so that a run that goes on elsewhere finds the same base again from its weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.four_bit import packed, unpacked
from dsmoelora.adapters.starts.svd import StartFactors
from dsmoelora.config import AdapterConfig


def loftq(weight_OD: Tensor, config: AdapterConfig, dtype: torch.dtype) -> tuple[StartFactors, StartFactors]:
    """What is taken from a weight before it is packed, and what its experts start from.

    Args:
        weight_OD: W0, whole and finite
        config: of the layer, with `E R <= min(D, O)`
        dtype: of the factors; those that are taken are rounded to it before they are used
    """
    (num_out, num_in), num_experts, rank = weight_OD.shape, config.num_experts, config.r
    a_EDR, b_EOR = (weight_OD.new_zeros(num_experts, size, rank, dtype=dtype) for size in (num_in, num_out))
    start = StartFactors(a_EDR, b_EOR)
    for _ in range(config.loftq_iterations):
        taken = start
        kept_OD = _packed_and_unpacked(without(weight_OD, taken, config.scale))
        start = _start_of(weight_OD.double() - kept_OD.double(), config, dtype)
    return taken, start


def without(weight_OD: Tensor, taken: StartFactors, scale: float) -> Tensor:
    """`W0 - (s / E) sum_e b_e a_e^T` (O, D) in fp32, for the factors of a layer with the scale s."""
    exact = (factor.to(weight_OD.device, torch.float64) for factor in (taken.a_EDR, taken.b_EOR))
    a_DF, b_OF = StartFactors(*exact).shift()
    return (weight_OD.double() - scale * (b_OF @ a_DF.t())).float()


def _packed_and_unpacked(weight_OD: Tensor) -> Tensor:
    num_out, num_in = weight_OD.shape
    return unpacked(packed(weight_OD, torch.float32), (num_out, num_in), torch.float32)


def _start_of(lost_OD: Tensor, config: AdapterConfig, dtype: torch.dtype) -> StartFactors:
    """The factors of all experts from what was lost (fp64)."""
    num_experts, rank = config.num_experts, config.r
    u_OF, singular_F, v_DF = _largest(lost_OD, num_experts * rank)
    places_ER = torch.arange(num_experts, device=lost_OD.device).unsqueeze(1)
    places_ER = places_ER + num_experts * torch.arange(rank, device=lost_OD.device)
    root_F = (config.num_used * singular_F / config.scale).sqrt()
    a_EDR, b_EOR = ((one * root_F)[:, places_ER].transpose(0, 1).to(dtype) for one in (v_DF, u_OF))
    return StartFactors(a_EDR.contiguous(), b_EOR.contiguous())


def _largest(matrix_OD: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (F,), and their vectors (O, F) and (D, F), from the smaller Gram matrix."""
    num_out, num_in = matrix_OD.shape
    if num_out < num_in:
        v_DF, singular_F, u_OF = _largest(matrix_OD.t(), count)
        return u_OF, singular_F, v_DF
    square_D, vectors_DD = torch.linalg.eigh(matrix_OD.t() @ matrix_OD)
    v_DF = vectors_DD[:, -count:].flip(1)
    singular_F = square_D[-count:].flip(0).clamp(min=0).sqrt()
    u_OF = matrix_OD @ v_DF / torch.where(singular_F > 0, singular_F, 1.0)
    return u_OF, singular_F, v_DF


@dataclass
class TakenOff:
    """What an adapter's training took from the weight of a layer before that was packed.

    Args:
        factors: of the layer
        scale: s
    """

    factors: StartFactors
    scale: float

    def __call__(self, weight_OD: Tensor) -> Tensor:
        """The weight to be packed."""
        return without(weight_OD, self.factors, self.scale)


@dataclass
class LoftqSearch:
    """Finds the start of a layer's experts when its weight passes by on its way to be packed.

    Args:
        config: of the layer
        dtype: of its factors
        device: where to compute

    Attributes:
        taken, start: as `loftq` gives them, on the host, once the weight has come; None on ranks that do not read it
        problem: why there is no start
    """

    config: AdapterConfig
    dtype: torch.dtype
    device: torch.device
    taken: StartFactors | None = None
    start: StartFactors | None = None
    problem: str = ""

    def __call__(self, weight_OD: Tensor) -> Tensor:
        """The weight to be packed."""
        there_OD = weight_OD.to(self.device)
        try:
            taken, start = loftq(there_OD, self.config, self.dtype)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self.problem = str(error)  # said when all ranks listen
            return weight_OD
        self.taken, self.start = taken.to_host(), start.to_host()
        return without(there_OD, taken, self.config.scale).to(weight_OD.device)
