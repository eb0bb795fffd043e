"""Experts whose `a` starts from the gradient of the weight that they adapt.

The factors begin with exchanged roles, `a = 0` and `b = Omega` (normal numbers). The adapted model says what the base
says, and an ordinary backward pass over the first rows gives each expert a sketch of its own gradient:

    grad_a_e = s sum_t g_te x_t (dy_t Omega_e) = M_e Omega_e          M_e = s sum_t g_te x_t^T dy_t   (D, O)

M_e is what gradient descent would add to the weight of expert e, weighed by its gates; the columns of `M_e Omega_e`
span its largest directions (the range finder of Halko, Martinsson & Tropp 2011, arXiv 0909.4061), and no (D, O) matrix
is ever made. From them `a` starts, orthogonal and as long as a draw of `kaiming`, and `b` at 0:

    per_expert    a_e = c Z_e (Z_e^T Z_e)^-1/2       Z_e = grad_a_e, normed to |Z_e| = 1        c = 1 / sqrt(3)
    joint         a   = c Z   (Z^T Z)^-1/2           Z = [Z_1 ... Z_E], (D, E R): no two experts share a direction

Directions that a sketch does not have (an expert without tokens has none) are those of the draw K of `kaiming`: with V
the eigenvectors of the Gram matrix that belong to them, `a` gets `K V V^T` in their place. To start from the largest
directions of the gradient is the thought of LoRA-GA (Wang et al. 2024, arXiv 2407.05000), for one expert and from the
singular vectors of the whole gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.products import side_by_side
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.adapters.starts.draws import draw_a, drawn
from dsmoelora.config import AdapterConfig, SpreadName

_COLUMN_LENGTH = 3**-0.5  # of a draw of `kaiming`, in the mean: its numbers have the variance 1 / (3 D)
_FP32_SUMS = 1e-5  # what rounding leaves of a direction that is not there, in fp32 sums over many tokens


def missing_below(dtype: torch.dtype) -> float:
    """Below what share of the largest direction of a sketch another one is rounding.

    Args:
        dtype: in which gradients are computed
    """
    return max(torch.finfo(dtype).eps, _FP32_SUMS)


def start_of_a(sketch_EDR: Tensor, config: AdapterConfig, layer: str, limit: float) -> tuple[Tensor, Tensor]:
    """What `a` of all experts of a layer starts from, fp32.

    Args:
        sketch_EDR: gradients of `a`
        config: seed and `init_spread`
        layer: name
        limit: directions of a sketch are drawn where they have less than this share of the largest

    Returns:
        `a` (E, D, R), and how many of its E R directions are drawn (scalar)
    """
    num_experts, in_features, rank = sketch_EDR.shape
    draw_EDR = drawn((config.seed, layer, "a"), range(num_experts), in_features, rank, draw_a)
    return orthogonal(sketch_EDR, draw_EDR.to(sketch_EDR.device), config.init_spread, limit)


def orthogonal(sketch_EDR: Tensor, draw_EDR: Tensor, spread: SpreadName, limit: float) -> tuple[Tensor, Tensor]:
    """The directions of the sketches, each `c` long and orthogonal to the others; in fp64 inside.

    Args:
        sketch_EDR: gradients of `a`
        draw_EDR: where directions that a sketch does not have come from
        spread: orthogonal over all experts, or within each
        limit: as of `start_of_a`

    Returns:
        as `start_of_a`
    """
    num_experts = len(sketch_EDR)
    unit_BDC, draw_BDC = sketch_EDR.double(), draw_EDR.double()
    length_E11 = torch.linalg.vector_norm(unit_BDC, dim=(1, 2), keepdim=True)
    unit_BDC = unit_BDC / torch.where(length_E11 > 0, length_E11, 1.0)
    if spread == "joint":
        unit_BDC, draw_BDC = (side_by_side(one).unsqueeze(0) for one in (unit_BDC, draw_BDC))
    squares_BC, vectors_BCC = torch.linalg.eigh(unit_BDC.mT @ unit_BDC)
    is_there_BC = squares_BC > limit**2 * squares_BC[:, -1:].clamp(min=0)
    stretch_BC = torch.where(is_there_BC, _COLUMN_LENGTH * squares_BC.clamp(min=0).rsqrt(), 0.0)
    found_BDC = unit_BDC @ (vectors_BCC * stretch_BC.unsqueeze(1)) @ vectors_BCC.mT
    found_BDC += draw_BDC @ (vectors_BCC * ~is_there_BC.unsqueeze(1)) @ vectors_BCC.mT
    start_DF = side_by_side(found_BDC)
    start_EDR = start_DF.unflatten(1, (num_experts, -1)).transpose(0, 1)
    return start_EDR.float().contiguous(), (~is_there_BC).sum()


@torch.no_grad()
def gradient_start(model: nn.Module, config: AdapterConfig) -> None:
    """Let experts start from the gradients that a model on plain tensors has at hand; these are cleared.

    For training loops without DeepSpeed: after `inject` with `init: gradient` and the backward pass over the first
    rows, before the first step. A layer that took no part has no gradient, and starts from the draw.

    Args:
        model: adapted
        config: that it was adapted with
    """
    for name, layer in adapted_layers(model):
        bank = layer.experts
        sketch_EDR = torch.zeros_like(bank.a) if bank.a.grad is None else bank.a.grad
        bank.a.copy_(start_of_a(sketch_EDR, config, name, missing_below(layer.base.weight.dtype))[0])
        bank.b.zero_()
    for parameter in model.parameters():
        parameter.grad = None
