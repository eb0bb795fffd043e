"""From scores to gates: which experts a token uses, and how much of each. All of it in fp32.

A gate is the softmax over the selected experts' scores, and exactly 0, without a gradient, for the others: so gates
alone say which experts a token uses. Shapes never depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# logits (T, E) fp32 -> gates (T, E) fp32
Rule = Callable[[Tensor], Tensor]

# logits (T, E) -> scores (T, E) whose softmax the gates are: -inf where an expert is not selected
Selection = Callable[[Tensor], Tensor]


class SoftmaxRule:
    """Gates are the softmax over the selected experts' scores, with its gradient written out.

    A function calls `forward` and `gradient_from_weighed` where it has a gradient of its own around them; elsewhere the
    rule is a function itself. An unselected expert has gate 0, and with it a gradient of 0 by itself.

    Args:
        select: from logits to scores; a score is the logit itself (see `of_scores` for others), or -inf
    """

    looks_back = False  # whether `of_scores` reads the logits

    def __init__(self, select: Selection) -> None:
        self.select = select

    def __call__(self, logits_TE: Tensor) -> Tensor:
        """A `Rule`."""
        gate_TE: Tensor = Decided.apply(logits_TE, self)
        return gate_TE

    def forward(self, logits_TE: Tensor) -> Tensor:
        """Gates, without a gradient."""
        return self.select(logits_TE).softmax(-1)

    def gradient_from_weighed(self, weighed_TE: Tensor, gate_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
        """Of the logits, from `weighed = gate * gradient of the gate`: that of a score is `w_e - gate_e sum_f w_f`."""
        total_T1 = weighed_TE.sum(-1, keepdim=True)
        return self.of_scores(torch.addcmul(weighed_TE, gate_TE, total_T1, value=-1), logits_TE)

    def of_scores(self, grad_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
        """The gradient of the logits from that of the scores."""
        return grad_TE


class Decided(torch.autograd.Function):
    """A `SoftmaxRule` by itself."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, rule: SoftmaxRule) -> Tensor:
        """Gates (T, E)."""
        gate_TE = rule.forward(logits_TE)
        ctx.rule = rule
        ctx.save_for_backward(gate_TE, logits_TE if rule.looks_back else None)
        return gate_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None]:
        """Of the logits."""
        gate_TE, logits_TE = ctx.saved_tensors
        of_scores_TE = torch.ops.aten._softmax_backward_data(grad_TE, gate_TE, -1, gate_TE.dtype)
        return ctx.rule.of_scores(of_scores_TE, logits_TE), None


def largest(logits_TE: Tensor, top_k: int) -> Tensor:
    """A `Selection`: the K largest of each token; among equal ones some, never more than K."""
    value_TK, chosen_TK = logits_TE.detach().topk(top_k, dim=-1)
    return torch.full_like(logits_TE, -torch.inf).scatter_(-1, chosen_TK, value_TK)


def all_experts(logits_TE: Tensor) -> Tensor:
    """A `Selection`: every one of them (LoRAMoE, Dou et al. 2024, arXiv 2312.09979)."""
    return logits_TE


def top_p(share: float) -> Selection:
    """The fewest experts whose probabilities reach `share` together (Huang et al. 2024, arXiv 2403.07652).

    The best expert is always among them.
    """

    def select(logits_TE: Tensor) -> Tensor:
        share_TE, order_TE = logits_TE.detach().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_TE = share_TE.cumsum(-1) - share_TE  # what the better experts have already
        value_TE = torch.where(before_TE < share, logits_TE.gather(-1, order_TE), -torch.inf)
        return torch.empty_like(logits_TE).scatter_(-1, order_TE, value_TE)

    return select
