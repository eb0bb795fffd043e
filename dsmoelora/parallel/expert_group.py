"""Inner products of expert outputs where the experts of a layer lie on several ranks (see `adapters.contrastive`).

P ranks, n sampled tokens of a rank, D in- and O out-features, E experts, L = E / P of them on a rank, rank R, `b` the
bytes of a parameter. A rank puts into its collectives, for a layer and a micro-batch,

    P n D b  (the tokens, to all)  +  n E R 4  (features)  +  L O R b  (its `b` factors)  +  (E R)^2 4  (cross-Grams)

and the same once more for the gradients. The cross-Grams need the `b` factors of every pair of experts. They are cut
anew for that, each rank taking O / P out-features of all experts, so no rank ever holds more of them than its own
share; then the partial products are summed. An output (n, E, O) never exists.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from dsmoelora.adapters.experts.similarity import cross_grams
from dsmoelora.parallel.exchange import AllToAll, Dispatch, GatherRoute, TokenExchange


class SumOverGroup(torch.autograd.Function):
    """The sum over the ranks of a group, on all of them; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """As `x`."""
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As `x`."""
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class PartitionedExperts:
    """The `ExpertGroup` of a rank that holds some of the experts (all of it is collective).

    Args:
        exchange: of the model's layers, which knows how many rows each rank has
        tokens_per_row: sampled of each row
    """

    def __init__(self, exchange: TokenExchange, tokens_per_row: int) -> None:
        self._exchange, self._tokens_per_row = exchange, tokens_per_row
        self._layout = exchange.layout

    def to_experts(self, x_TD: Tensor) -> Tensor:
        """(P longest, D): the tokens of all ranks, as many places for each as the rank with most has."""
        sent: Tensor = Dispatch.apply(x_TD, self._route())
        return sent

    def from_experts(self, features_MLR: Tensor) -> Tensor:
        """(T, E, R): from (P longest, L, R)."""
        num_local, rank = features_MLR.shape[1:]
        num_ranks, num_own = self._layout.ep_size, self._num_tokens()[self._layout.ep_rank]
        counts = [len(features_MLR) // num_ranks] * num_ranks
        back = AllToAll.apply(features_MLR.flatten(1).contiguous(), counts, counts, self._layout.expert_group)
        by_rank = back.view(num_ranks, counts[0], num_local, rank)
        by_token: Tensor = by_rank.transpose(0, 1).flatten(1, 2)[:num_own]
        return by_token

    def cross_grams(self, b_LOR: Tensor) -> Tensor:
        """(E, E, R, R) fp32."""
        num_local, out_features, rank = b_LOR.shape
        num_ranks, group = self._layout.ep_size, self._layout.expert_group
        share = -(-out_features // num_ranks)
        padded_OLR = torch.nn.functional.pad(b_LOR.transpose(0, 1), (0, 0, 0, 0, 0, num_ranks * share - out_features))
        counts = [share] * num_ranks
        mine = AllToAll.apply(padded_OLR.flatten(1).contiguous(), counts, counts, group)
        mine_EOR = mine.view(num_ranks, share, num_local, rank).transpose(1, 2).flatten(0, 1)
        total: Tensor = SumOverGroup.apply(cross_grams(mine_EOR), group)
        return total

    def _num_tokens(self) -> list[int]:
        return [self._tokens_per_row * rows for rows in self._exchange.num_rows]

    def _route(self) -> GatherRoute:
        return GatherRoute(self._num_tokens(), self._layout.ep_rank, self._layout.expert_group)
