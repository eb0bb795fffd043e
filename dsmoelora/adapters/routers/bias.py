"""The router of DeepSeek's balancing without a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsmoelora.adapters.routers.base import RouterPlace, TopK
from dsmoelora.adapters.routers.linear import LinearRouter
from dsmoelora.adapters.routers.rules import SoftmaxRule


class SigmoidRule(SoftmaxRule):
    """Gates are the selected experts' sigmoids, divided by their sum.

    That is a softmax of logarithms, so it holds also where the sigmoids are too small for fp32.
    """

    looks_back = True

    def of_scores(self, grad_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
        """Through the logarithm of the sigmoid, whose derivative is the sigmoid of `-logit`."""
        assert logits_TE is not None, "they were kept"
        return grad_TE * (-logits_TE).sigmoid()


class SigmoidBiasRouter(LinearRouter):
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
        super().__init__(place, SigmoidRule(self._select))
        self.bias_steps: Tensor
        steps_E = torch.zeros(place.num_experts, dtype=torch.int32, device=place.like.device)
        self.register_buffer("bias_steps", steps_E)
        self._top_k, self._rate = TopK(top_k, place.context), rate

    def _select(self, logits_TE: Tensor) -> Tensor:
        is_selected_TE = self._top_k(logits_TE.sigmoid() + self._rate * self.bias_steps) > -torch.inf
        return torch.where(is_selected_TE, nn.functional.logsigmoid(logits_TE), -torch.inf)


def move_biases(routers: Sequence[SigmoidBiasRouter], counts: Sequence[Tensor]) -> None:
    """Move the bias of every expert by one step towards balance.

    Args:
        routers: of all layers
        counts: (E,) for each of them, how many tokens of the global batch used an expert; the same on all ranks
    """
    directions = [(counts_E.mean() - counts_E).sign().to(torch.int32) for counts_E in counts]
    if routers:
        torch._foreach_add_([router.bias_steps for router in routers], directions)
