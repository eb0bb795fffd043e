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
from typing import Any

import torch
from torch import Tensor

from dsmoelora.adapters.routing.sums import ExpertsOfRouters, Totals
from dsmoelora.config import LossesConfig


@dataclass(frozen=True)
class LossesOfTokens:
    """What the losses of a router make of N tokens or sequences.

    Args:
        num_tokens_N: fp32, how many real tokens each of them stands for: 0 for padding
        shares_E: fp32, `f_e`
        balance: what `sum_e f_e p_e` of one token counts in the loss that is handed to the backward pass
        z: the same of `logsumexp^2`
    """

    num_tokens_N: Tensor
    shares_E: Tensor
    balance: float
    z: float

    def add_to(self, grad_NE: Tensor, logits_NE: Tensor) -> Tensor:
        """A gradient of the logits, and `p_e (balance (f_e - sum_f f_f p_f) + 2 z logsumexp)` for every token.

        The first term is what a softmax gives back for the gradient `balance f_e` of its outputs.
        """
        num_tokens_N1, share_NE = self.num_tokens_N.unsqueeze(-1), logits_NE.softmax(-1)
        if self.balance:
            of_shares_NE = num_tokens_N1 * self.shares_E
            of_logits_NE = torch.ops.aten._softmax_backward_data(of_shares_NE, share_NE, -1, share_NE.dtype)
            grad_NE = torch.add(grad_NE, of_logits_NE, alpha=self.balance)
        if self.z:
            log_total_N1 = logits_NE.logsumexp(-1, keepdim=True)
            grad_NE = torch.addcmul(grad_NE, share_NE, log_total_N1 * num_tokens_N1, value=2 * self.z)
        return grad_NE

    def attach(self, logits_NE: Tensor) -> Tensor:
        """The logits, on whose way back this is added."""
        logits: Tensor = WithRouterLosses.apply(logits_NE, self)
        return logits


class WithRouterLosses(torch.autograd.Function):
    """The logits as they are; on the way back the losses' gradient is added to theirs."""

    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, losses: LossesOfTokens) -> Tensor:
        """`logits_NE`, fp32."""
        ctx.save_for_backward(logits_NE)
        ctx.losses = losses
        return logits_NE.view_as(logits_NE)

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, None]:
        """See `LossesOfTokens.add_to`."""
        return ctx.losses.add_to(grad_NE, *ctx.saved_tensors), None


class RouterLosses:
    """The losses of all routers of a model: their gradients in the backward pass, their values after it.

    Args:
        sizes: number of experts of each router
        config: weights of the losses
        device: of the model

    Attributes:
        names: of the losses that are switched on
        shares: (sum of all E,) fp64, `f_e` of every expert
    """

    def __init__(self, sizes: list[int], config: LossesConfig, device: torch.device) -> None:
        self.names = [name for name in ("balance", "z") if getattr(config, name)] if sizes else []
        self._config, self._sizes = config, sizes
        self._experts = ExpertsOfRouters(sizes, device)
        self.shares = self._experts.uniform.clone()
        self._shares_fp32 = self.shares.float()
        self._shares_of_router = self._shares_fp32.split(sizes)
        self._per_token = 0.0

    def begin_step(self, num_tokens: int, scale: float) -> None:
        """What the losses of a token count from now on.

        Args:
            num_tokens: real tokens of the global batch
            scale: what the sum of all ranks' gradients is divided by later
        """
        self._per_token = scale / (max(1, len(self._sizes)) * num_tokens)

    def of_tokens(self, router: int, num_tokens_N: Tensor) -> LossesOfTokens:
        """What they make of tokens that a router looks at."""
        balance, z = (weight * self._per_token for weight in (self._config.balance, self._config.z))
        return LossesOfTokens(num_tokens_N, self._shares_of_router[router], balance * self._sizes[router], z)

    def values(self, totals: Totals, num_tokens: int) -> list[Tensor]:
        """Of those in `names`, without weights, with the counts of the step at hand."""
        shares = self._experts.shares(totals.choices)
        balance = self._experts.per_router(shares / self._experts.uniform * totals.probabilities)
        values = {"balance": balance.mean() / num_tokens, "z": totals.z.mean() / num_tokens}
        return [values[name] for name in self.names]

    def finish_step(self, totals: Totals) -> None:
        """Take the choices of this step for those that the next one is judged by."""
        self.load_shares(self._experts.shares(totals.choices))

    def load_shares(self, shares: Tensor) -> None:
        """Take over `shares`."""
        self.shares.copy_(shares)
        self._shares_fp32.copy_(shares)
