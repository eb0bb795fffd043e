"""Routers for experts that were trained apart: one with a few numbers to learn, one with none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoelora.adapters.routers.base import Report, RouterPlace, TopK, logits_of
from dsmoelora.adapters.routers.rules import Rule, SoftmaxRule, all_experts
from dsmoelora.config.adapter_options import RouterStart


def free_rule(weight_TE: Tensor) -> Tensor:
    """The weights themselves are the gates."""
    return weight_TE


class ConstantRouter(nn.Module):
    """The same gates for every token: E trained numbers, so that the mixture is exactly one LoRA.

        softmax    g = softmax(w), w from 0 on: gates start at 1 / E and sum to 1
        mean       g = w, from 1 / E on
        sum        g = w, from 1 on: each expert starts as it was trained

    LoRA Soups' CAT (Prabhakar et al. 2024, arXiv 2410.13025) trains such numbers on experts that stay as they are.

    Args:
        place: where it stands
        start: which of the three
    """

    def __init__(self, place: RouterPlace, start: RouterStart) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": (place.num_experts, 1)}
        first = {"softmax": 0.0, "mean": 1 / place.num_experts, "sum": 1.0}[start]
        self.weight = nn.Parameter(place.zero_start(place.num_experts, 1).detach() + first)
        self._rule = _rule(start)
        self._report = Report(place)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight_TE = self.weight.to(wide).t().expand(len(x_TD), -1)
        return self._report.decide(weight_TE, self._rule, self.training)


def constant_gates(weight_E1: Tensor, start: RouterStart) -> Tensor:
    """(E,) fp64: the gates of a `ConstantRouter` with this weight."""
    return _rule(start)(weight_E1.double().t())[0]


def _rule(start: RouterStart) -> Rule:
    return SoftmaxRule(all_experts) if start == "softmax" else free_rule


class ArrowRouter(nn.Module):
    """Gates by how much of a token lies along each expert's strongest direction; nothing is trained.

        l_e = |x p_e^T| / temperature    gate = softmax of l over its K largest

    `p_e` is the leading right singular vector of the expert's update, as it was when the experts started: Arrow,
    Ostapenko et al. 2024 (arXiv 2405.11157), with the options of PEFT's.

    Args:
        place: where it stands
        top_k: K
        temperature: by which similarities are divided
    """

    def __init__(self, place: RouterPlace, top_k: int, temperature: float) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape}
        self.weight = place.zero_start(*place.shape)
        self._rule, self._temperature = SoftmaxRule(TopK(top_k, place.context)), temperature
        self._report = Report(place)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 that sum to 1."""
        logits_TE = logits_of(x_TD, self.weight).abs() / self._temperature
        return self._report.decide(logits_TE, self._rule, self.training)


def prototypes(a_EDR: Tensor, b_EOR: Tensor) -> Tensor:
    """(E, D) fp32: the leading right singular vector of each update `b a^T` (O, D); 0 where the update is.

    From two QR decompositions and the SVD of an (R, R) matrix. The largest entry is positive, on every rank.
    """
    (q_EDR, upper_a), (_, upper_b) = (torch.linalg.qr(factor.double()) for factor in (a_EDR, b_EOR))
    u_ERR, singular_ER, _ = torch.linalg.svd(upper_a @ upper_b.mT)
    first_ED = (q_EDR @ u_ERR[..., :1]).squeeze(-1)
    largest_E1 = first_ED.gather(1, first_ED.abs().argmax(1, keepdim=True))
    return (first_ED * largest_E1.sign() * (singular_ER[:, :1] > 0)).float()
