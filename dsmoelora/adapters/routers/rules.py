"""From scores to gates: which experts a token uses, and how much of each. All of it in fp32.

A gate is the softmax over the selected experts' scores, and exactly 0, without a gradient, for the others. Shapes
never depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# scores (T, E) fp32 -> gates (T, E) fp32, selected (T, E) bool
Rule = Callable[[Tensor], tuple[Tensor, Tensor]]


class SoftmaxOverSelected(torch.autograd.Function):
    """The softmax over the selected experts. An unselected one has gate 0, and with it a gradient of 0 by itself."""

    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, selected_TE: Tensor) -> Tensor:
        """(T, E)."""
        gate_TE = torch.where(selected_TE, scores_TE, -torch.inf).softmax(-1)
        ctx.save_for_backward(gate_TE)
        return gate_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None]:
        """Of the scores."""
        (gate_TE,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grad_TE, gate_TE, -1, gate_TE.dtype), None


def softmax_over(scores_TE: Tensor, selected_TE: Tensor) -> Tensor:
    """(T, E): softmax over the selected experts of each token, 0 for the rest."""
    gate_TE: Tensor = SoftmaxOverSelected.apply(scores_TE, selected_TE)
    return gate_TE


def largest(scores_TE: Tensor, top_k: int) -> Tensor:
    """(T, E) bool: the K largest scores of each token; among equal ones some, never more than K."""
    chosen_TK = scores_TE.detach().topk(top_k, dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, chosen_TK, True)


def all_rule(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert, weighted by the softmax (LoRAMoE, Dou et al. 2024, arXiv 2312.09979)."""
    return logits_TE.softmax(-1), torch.ones_like(logits_TE, dtype=torch.bool)


def top_p_rule(top_p: float) -> Rule:
    """The fewest experts whose probabilities reach `top_p` together (Huang et al. 2024, arXiv 2403.07652).

    Their probabilities are renormalised. The best expert is always among them.
    """

    def rule(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        share_TE, order_TE = logits_TE.detach().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_TE = share_TE.cumsum(-1) - share_TE  # what the better experts have already
        selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, order_TE, before_TE < top_p)
        return softmax_over(logits_TE, selected_TE), selected_TE

    return rule
