"""How alike the updates of a layer's experts are: the cosines between `delta_e = a_e m_e b_e^T`.

    <delta_e, delta_f> = sum over all entries of (m_e^T a_e^T a_f m_f) * (b_e^T b_f)

So R x R products of the factors' columns are enough, and no tensor of the size of a weight exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.experts.products import side_by_side


@dataclass(frozen=True)
class ExpertCosines:
    """How alike the experts of a model are; layers with several experts, in the order of the model.

    Args:
        layers: names
        largest: for each layer and expert the largest cosine with another expert; NaN where its update is 0
        mean: for each layer the mean over all pairs of experts; NaN where there is no pair of updates that are not 0
    """

    layers: list[str]
    largest: list[list[float]]
    mean: list[float]


def cross_grams(x_EXR: Tensor) -> Tensor:
    """(E, E, R, R) fp32: `x_e^T x_f` for every pair of experts."""
    num_experts, _, rank = x_EXR.shape
    x_XF = side_by_side(x_EXR.float())
    return (x_XF.t() @ x_XF).view(num_experts, rank, num_experts, rank).transpose(1, 2)


def cosine_matrix(a_EDR: Tensor, b_EOR: Tensor, m_ERR: Tensor | None = None) -> Tensor:
    """(E, E) fp32: cosines between the experts' updates, NaN for those that are 0.

    Args:
        a_EDR: (E, D, R)
        b_EOR: (E, O, R)
        m_ERR: mixers (E, R, R), where there are any
    """
    gram_EERR = cross_grams(a_EDR)
    if m_ERR is not None:
        m_ERR = m_ERR.float()
        gram_EERR = m_ERR.mT.unsqueeze(1) @ gram_EERR @ m_ERR
    product_EE = (gram_EERR * cross_grams(b_EOR)).sum((-2, -1))
    norm_E = product_EE.diagonal().clamp(min=0).sqrt()
    return product_EE / (norm_E.unsqueeze(1) * norm_E)


def largest_and_mean(cosine_EE: Tensor) -> Tensor:
    """(E + 1,): each expert's largest cosine with another one, and the mean over all pairs; NaN where there is none."""
    own_EE = torch.eye(len(cosine_EE), dtype=torch.bool, device=cosine_EE.device)
    others_EE = cosine_EE.masked_fill(own_EE | cosine_EE.isnan(), -torch.inf)
    largest_E = others_EE.amax(-1)
    mean = cosine_EE.masked_fill(own_EE, torch.nan).nanmean()
    return torch.cat((largest_E.masked_fill(largest_E == -torch.inf, torch.nan), mean.unsqueeze(0)))
