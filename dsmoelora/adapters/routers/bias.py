"""The router of DeepSeek's balancing without a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsmoelora.adapters.routers.base import Report, RouterPlace, TokenRouter, TopKRule
from dsmoelora.adapters.routers.rules import largest, softmax_over


class SigmoidBiasRouter(TokenRouter):
    """The K experts with the largest score plus bias, weighted by their scores alone.

        score = sigmoid(x W^T)    selected = top-k of (score + bias)    gate_e = score_e / sum over selected of score

    After every optimizer step the bias of an expert that more tokens used than the mean goes down by `rate`, that of
    one with fewer up by as much: Wang et al. 2024 (arXiv 2408.15664), used in DeepSeek-V3. So the bias is always a
    whole multiple of `rate`, and is kept as that: exact in any dtype of the model.

    Args:
        place: where it stands
        top_k: K
        rate: how far a bias moves in a step
    """

    def __init__(self, place: RouterPlace, top_k: int, rate: float) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape}
        self.weight = place.uniform_start()
        self.bias_steps: Tensor
        steps_E = torch.zeros(place.num_experts, dtype=torch.int32, device=place.like.device)
        self.register_buffer("bias_steps", steps_E)
        self._top_k, self._rate, self._report = TopKRule(top_k, place.context), rate, Report(place)

    def forward(self, x_TD: Tensor) -> tuple[Tensor | None, ...]:
        """`x_TD`, gates (T, E) fp32 that sum to 1, and the selected experts (T, E) bool."""
        x_TD, logits_TE, features = self.project(x_TD, self.weight)
        return x_TD, *self._report.decide(logits_TE, self._rule, self.training), *features

    def _rule(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        selected_TE = largest(logits_TE.detach().sigmoid() + self._rate * self.bias_steps, self._top_k.num_used)
        # a softmax of logarithms: the scores divided by their sum, also where they are too small for fp32
        return softmax_over(nn.functional.logsigmoid(logits_TE), selected_TE), selected_TE


def move_biases(routers: Sequence[SigmoidBiasRouter], counts: Sequence[Tensor]) -> None:
    """Move the bias of every expert by one step towards balance.

    Args:
        routers: of all layers
        counts: (E,) for each of them, how many tokens of the global batch used an expert; the same on all ranks
    """
    directions = [(counts_E.mean() - counts_E).sign().to(torch.int32) for counts_E in counts]
    if routers:
        torch._foreach_add_([router.bias_steps for router in routers], directions)
