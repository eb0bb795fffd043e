"""Losses of the routers: balance and z.

    balance = mean over layers of  E sum_e f_e P_e          P_e = mean over tokens of softmax(logits)_e
    z       = mean over layers of  mean over tokens of  logsumexp(logits)^2

`f_e` is expert e's share of all choices in the optimizer step before (1 / E in the first), so it is a constant, and
the gradient of a global batch is the sum of its tokens' gradients however they are split over ranks and micro-batches.
Balance: Fedus et al. 2021 (arXiv 2101.03961, eq. 4) but for that; z: Zoph et al. 2022 (arXiv 2202.08906, eq. 5).

What a token adds depends on its own logits alone. So the gradient is added where the gradient of the logits passes by,
in the backward pass, and no graph beside the model's own is kept; layers that are recomputed there add nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class LossWeights:
    """What one token's term of a layer counts in the loss that is handed to the backward pass.

    Args:
        balance: of `sum_e f_e p_e`
        z: of `logsumexp^2`
    """

    balance: float = 0.0
    z: float = 0.0


class WithRouterLosses(torch.autograd.Function):
    """The logits as they are; on the way back the losses' gradient is added to theirs."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_NE: Tensor, num_tokens_N: Tensor, shares_E: Tensor, weights: LossWeights
    ) -> Tensor:
        """`logits_NE`.

        Args:
            logits_NE: fp32, of N tokens or sequences
            num_tokens_N: fp32, how many real tokens each of them stands for: 0 for padding
            shares_E: fp32, `f_e`
            weights: of the two terms
        """
        ctx.save_for_backward(logits_NE, num_tokens_N, shares_E)
        ctx.weights = weights  # type: ignore[attr-defined]
        return logits_NE.view_as(logits_NE)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_NE: Tensor) -> tuple[Tensor, None, None, None]:
        """`p_e (balance (f_e - sum_f f_f p_f) + 2 z logsumexp)` for every token, added to what comes from above."""
        logits_NE, num_tokens_N, shares_E = ctx.saved_tensors  # type: ignore[attr-defined]
        weights: LossWeights = ctx.weights  # type: ignore[attr-defined]
        log_total_N1 = logits_NE.logsumexp(-1, keepdim=True)
        share_NE = (logits_NE - log_total_N1).exp()
        per_share_NE = 2 * weights.z * log_total_N1
        if weights.balance:
            mean_N1 = (share_NE * shares_E).sum(-1, keepdim=True)
            per_share_NE = per_share_NE + weights.balance * (shares_E - mean_N1)
        return torch.addcmul(grad_NE, share_NE * num_tokens_N.unsqueeze(-1), per_share_NE), None, None, None
