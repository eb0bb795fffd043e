"""Routers: which experts a token uses, and how much of each.

A router maps tokens (T, D) to gates (T, E) in fp32 and a bool mask of the selected experts. Unselected experts have a
gate of exactly 0 and get no gradient. The tokens come back with them, to be used in place of those that went in (see
`RouterLogits`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoelora.adapters.function import RouterLogits
from dsmoelora.seeds import empty_start, generator


class SoftmaxTopKRouter(nn.Module):
    """Softmax over the K largest logits, 0 for the rest: `gate = softmax(where(top-k, x W^T, -inf))`.

    This equals the full softmax renormalised over its K largest entries.

    Args:
        in_features: D
        num_experts: E
        top_k: K
        like: tensor whose dtype and device the weight takes
        seed_parts: what the initial weight derives from
    """

    def __init__(
        self, in_features: int, num_experts: int, top_k: int, like: Tensor, seed_parts: tuple[int | str, ...]
    ) -> None:
        super().__init__()
        self.shape = (num_experts, in_features)
        self.top_k = top_k
        bound = in_features**-0.5
        start = empty_start(self.shape).uniform_(-bound, bound, generator=generator(*seed_parts))
        self.weight = nn.Parameter(start.to(like.dtype).to(like.device))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x_TD`, gates (T, E) fp32 that sum to 1, and the selected experts (T, E) bool."""
        x_TD, logits_TE = RouterLogits.apply(x_TD, self.weight)
        chosen_TK = logits_TE.topk(self.top_k, dim=-1).indices
        selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, chosen_TK, True)
        return x_TD, logits_TE.masked_fill(~selected_TE, -torch.inf).softmax(-1), selected_TE


class SingleExpertRouter(nn.Module):
    """The router of a layer with one expert: gate 1 for every token, nothing to learn (plain LoRA)."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x_TD`, ones (T, 1) fp32 and True (T, 1)."""
        gate_TE = x_TD.new_ones(x_TD.shape[0], 1, dtype=torch.float32)
        return x_TD, gate_TE, gate_TE.bool()
