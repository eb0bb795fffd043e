"""InfoNCE over expert outputs, from low-rank features and cross-Grams.

Shapes: `B` rows of a micro-batch, `N` tokens sampled of each (also written `M` where two tokens meet), `E` experts
(also `G`), `R` rank (also `Q`), `F = E R`, `K` experts that a token uses at most, `A = N K` anchors (`C` candidates).

The output of expert e for token t is `z_te = h_te b_e^T` with features `h_te = x_t a_e`, so

    <z_te, z_uf> = h_te (b_e^T b_f) h_uf^T

and no tensor has both a dim of tokens and the O out-features. With the cosine `c(i, j)` of two outputs, positives P_i
and negatives N_i of an anchor i and temperature tau, the loss of an anchor is

    mean over p in P_i of  -log( exp(c(i, p) / tau) / (exp(c(i, p) / tau) + sum over n in N_i of exp(c(i, n) / tau)) )

that of a row the mean over its anchors with at least one of both, 0 if there are none. Outputs are those before the
gate, which has no say in a cosine anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Outputs shorter than this have no direction worth pulling at; at b = 0 all cosines are 0, and so is the gradient.
SHORTEST = 1e-6
_NEVER = -1e9


def experts_apart(
    unit_BNER: Tensor, gram_EGRQ: Tensor, active_BNE: Tensor, same_BNM: Tensor, tau: float, num_used: int
) -> Tensor:
    """(B,): an expert's outputs for other tokens are positives, outputs of other experts negatives (Luo et al. 2024).

    Only outputs that are used take part. Pairs are formed within a sequence.

    Args:
        unit_BNER: features of outputs of length 1, from `unit_features`
        gram_EGRQ: cross-Grams `b_e^T b_g`
        active_BNE: bool, which outputs are used: real tokens, selected experts
        same_BNM: bool, which tokens of a row are of one sequence
        tau: temperature
        num_used: K, experts of a token at most
    """
    num_tokens = active_BNE.shape[1]
    # the used ones of each token come first, so that K^2 pairs of two tokens are looked at, not E^2
    expert_BNK = active_BNE.int().argsort(dim=-1, descending=True, stable=True)[..., :num_used]
    place_BNK1R = expert_BNK[..., None, None].expand(-1, -1, -1, 1, unit_BNER.shape[-1])
    used_BNKR = unit_BNER.gather(2, place_BNK1R.squeeze(3))
    in_place_BNKER = torch.zeros_like(unit_BNER).unsqueeze(2).repeat(1, 1, num_used, 1, 1)
    in_place_BAF = in_place_BNKER.scatter(3, place_BNK1R, used_BNKR.unsqueeze(3)).flatten(3).flatten(1, 2)
    turned_BNEF = torch.einsum("bner,egrq->bnegq", unit_BNER / tau, gram_EGRQ).flatten(3)
    turned_BAF = turned_BNEF.gather(2, place_BNK1R[..., :1].squeeze(3).expand(-1, -1, -1, in_place_BAF.shape[-1]))
    score_BAC = turned_BAF.flatten(1, 2) @ in_place_BAF.mT
    expert_BA, used_BA = expert_BNK.flatten(1), active_BNE.gather(-1, expert_BNK).flatten(1)
    token_A = torch.arange(num_tokens, device=active_BNE.device).repeat_interleave(num_used)
    allowed_BAC = same_BNM[:, token_A][:, :, token_A] & used_BA.unsqueeze(-1) & used_BA.unsqueeze(-2)
    same_expert_BAC = expert_BA.unsqueeze(-1) == expert_BA.unsqueeze(-2)
    other_token_AC = token_A.unsqueeze(-1) != token_A
    return info_nce(score_BAC, allowed_BAC & same_expert_BAC & other_token_AC, allowed_BAC & ~same_expert_BAC)


def coactive_together(unit_BNER: Tensor, gram_EGRQ: Tensor, active_BNE: Tensor, real_BN: Tensor, tau: float) -> Tensor:
    """(B,): for one token, outputs of its other selected experts are positives, of the rest negatives (CoMoE).

    Args:
        unit_BNER, gram_EGRQ, active_BNE, tau: see `experts_apart`
        real_BN: bool, False for padding
    """
    turned_BNEGQ = torch.einsum("bner,egrq->bnegq", unit_BNER, gram_EGRQ)
    cosine_BNEG = torch.einsum("bnegq,bngq->bneg", turned_BNEGQ, unit_BNER)
    same_expert_EG = torch.eye(active_BNE.shape[-1], dtype=torch.bool, device=active_BNE.device)
    anchor_BNE1 = active_BNE.unsqueeze(-1)
    positive_BNEG = anchor_BNE1 & active_BNE.unsqueeze(-2) & ~same_expert_EG
    negative_BNEG = anchor_BNE1 & ~active_BNE.unsqueeze(-2) & real_BN[..., None, None]
    pairs = (each.flatten(1, 2) for each in (cosine_BNEG / tau, positive_BNEG, negative_BNEG))
    return info_nce(*pairs)


def unit_features(features_BNER: Tensor, gram_EGRQ: Tensor) -> Tensor:
    """(B, N, E, R) fp32: the features of outputs of length 1 (shorter where an output is nearly 0)."""
    own_ERQ = gram_EGRQ.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    square_BNE = torch.einsum("bner,erq,bneq->bne", features_BNER, own_ERQ, features_BNER)
    return features_BNER / (square_BNE.clamp(min=0) + SHORTEST**2).sqrt().unsqueeze(-1)


def info_nce(score_BAC: Tensor, positive_BAC: Tensor, negative_BAC: Tensor) -> Tensor:
    """(B,): mean over the anchors that have positives and negatives, 0 where none has both; see above.

    Args:
        score_BAC: cosines of A anchors with C candidates, over the temperature
        positive_BAC, negative_BAC: bool
    """
    others_BA1 = score_BAC.masked_fill(~negative_BAC, _NEVER).logsumexp(-1, keepdim=True)
    # -log(exp(s) / (exp(s) + exp(others))) = softplus(others - s)
    per_pair_BAC = torch.nn.functional.softplus(others_BA1 - score_BAC) * positive_BAC
    num_positive_BA = positive_BAC.sum(-1)
    counts_BA = (num_positive_BA > 0) & negative_BAC.any(-1)
    per_anchor_BA = per_pair_BAC.sum(-1) / num_positive_BA.clamp(min=1)
    return (per_anchor_BA * counts_BA).sum(-1) / counts_BA.sum(-1).clamp(min=1)
