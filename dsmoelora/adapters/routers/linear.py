"""Routers whose logits are linear in the token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsmoelora.adapters.keyed.draws import keyed_normal
from dsmoelora.adapters.routers.base import Report, RouterPlace, logits_of
from dsmoelora.adapters.routers.rules import Rule, SoftmaxRule
from dsmoelora.seeds import derive_seed

if TYPE_CHECKING:
    from dsmoelora.adapters.routing.losses import LossesOfTokens


class LinearRouter(nn.Module):
    """Logits `x W^T` and a rule that makes gates of them.

    Where the experts read the tokens that it reads, the logits come out of their product (see `RoutedExperts`), and
    this module is not called itself.

    Args:
        place: where it stands
        rule: from logits to gates

    Attributes:
        rule: the same
    """

    def __init__(self, place: RouterPlace, rule: SoftmaxRule) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape}
        self.weight = place.uniform_start()
        self.rule, self._report = rule, Report(place)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 that sum to 1."""
        return self._report.decide(logits_of(x_TD, self.weight), self.rule, self.training)

    def decide(self, logits_TE: Tensor) -> tuple[Tensor, LossesOfTokens | None]:
        """Gates of logits that others have made, without a gradient, and what is to be added to that of the logits."""
        gate_TE = self.rule.forward(logits_TE)
        return gate_TE, self._report.losses_of(logits_TE, gate_TE, self.training)


class NoisyRouter(nn.Module):
    """Logits with learned noise in training, `x W^T + eps softplus(x V^T)`, `eps` standard normal, and a rule.

    Noisy top-k gating of Shazeer et al. 2017 (arXiv 1701.06538, eq. 4). The noise is a pure function of
    (seed, step, sequence, position, layer, expert). V starts at 0.

    Args:
        place: where it stands
        rule: from logits to gates
    """

    def __init__(self, place: RouterPlace, rule: Rule) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape, "noise_weight": place.shape}
        self.weight = place.uniform_start()
        self.noise_weight = place.zero_start(*place.shape)
        self._noise_key = derive_seed("router noise", place.layer)
        self._rule, self._report, self._context = rule, Report(place), place.context

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 that sum to 1."""
        if not self.training:
            logits_TE = logits_of(x_TD, self.weight)
        else:
            logits_TE, spread_TE = logits_of(x_TD, self.weight, self.noise_weight).chunk(2, dim=-1)
            logits_TE = logits_TE + self._noise_like(logits_TE) * nn.functional.softplus(spread_TE)
        return self._report.decide(logits_TE, self._rule, self.training)

    def _noise_like(self, logits_TE: Tensor) -> Tensor:
        keys_BS = self._context.tokens.keys_BS
        if keys_BS is None:
            return torch.randn_like(logits_TE)
        return keyed_normal(keys_BS.reshape(-1), self._noise_key, logits_TE.shape[-1])


class ThresholdRouter(nn.Module):
    """The experts whose probability is above a learned threshold, weighted by what they have above it.

        p = softmax(x W^T)    tau = sigmoid(x v^T + c) / E    gate_e = (p_e - tau)+ / sum_f (p_f - tau)+

    AdaMoLE, Liu & Luo 2024 (arXiv 2405.00361). The largest probability is at least 1 / E, so some expert is
    always above the threshold. v and c start at 0, which is half of the highest threshold.

    Args:
        place: where it stands
    """

    def __init__(self, place: RouterPlace) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {
            "weight": place.shape,
            "threshold_weight": (1, place.in_features),
            "threshold_bias": (1,),
        }
        self.weight = place.uniform_start()
        self.threshold_weight = place.zero_start(1, place.in_features)
        self.threshold_bias = place.zero_start(1)
        self._num_experts, self._report = place.num_experts, Report(place)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 that sum to 1."""
        both_TF = logits_of(x_TD, self.weight, self.threshold_weight)
        logits_TE, raw_T1 = both_TF.split([self._num_experts, 1], dim=-1)
        threshold_T1 = (raw_T1 + self.threshold_bias.float()).sigmoid() / self._num_experts

        def rule(logits_TE: Tensor) -> Tensor:
            above_TE = (logits_TE.softmax(-1) - threshold_T1).relu()
            # All zero only where all probabilities are equal and the sigmoid rounds to 1: then no expert is used.
            total_T1 = above_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            return above_TE / total_T1

        return self._report.decide(logits_TE, rule, self.training)


class SingleExpertRouter(nn.Module):
    """The router of a layer with one expert: gate 1 for every token, nothing to learn (plain LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def forward(self, x_TD: Tensor) -> Tensor:
        """Ones (T, 1) fp32."""
        return x_TD.new_ones(x_TD.shape[0], 1, dtype=torch.float32)
