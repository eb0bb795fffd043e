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
from dsmoelora.parallel.exchange import TokenExchange
from dsmoelora.parallel.routes import GatherRoute
from dsmoelora.parallel.transfer import Transfer


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
        self._placement = exchange.placement

    def to_experts(self, x_TD: Tensor) -> Tensor:
        """(P longest, D): the tokens of all ranks, as many places for each as the rank with most has."""
        route = self._route(self._num_tokens())
        return Transfer(x_TD, route.send, route.sum_back).result()

    def from_experts(self, features_MLR: Tensor) -> Tensor:
        """(T, E, R): from (P longest, L, R)."""
        num_tokens = self._num_tokens()
        route = self._route(num_tokens)
        back_MLR = Transfer(features_MLR, route.swap, route.swap).result()
        by_rank_PTLR = back_MLR.unflatten(0, (self._placement.ep_size, route.longest))
        return by_rank_PTLR.transpose(0, 1).flatten(1, 2)[: num_tokens[self._placement.ep_rank]]

    def cross_grams(self, b_LOR: Tensor) -> Tensor:
        """(E, E, R, R) fp32."""
        num_ranks, out_features = self._placement.ep_size, b_LOR.shape[1]
        share = -(-out_features // num_ranks)
        padded_OLR = torch.nn.functional.pad(b_LOR.transpose(0, 1), (0, 0, 0, 0, 0, num_ranks * share - out_features))
        route = self._route([share] * num_ranks)
        mine_OLR = Transfer(padded_OLR, route.swap, route.swap).result()
        mine_EOR = mine_OLR.unflatten(0, (num_ranks, share)).transpose(1, 2).flatten(0, 1)
        total: Tensor = SumOverGroup.apply(cross_grams(mine_EOR), self._placement.expert_group)
        return total

    def _num_tokens(self) -> list[int]:
        return [self._tokens_per_row * rows for rows in self._exchange.num_rows]

    def _route(self, counts: list[int]) -> GatherRoute:
        return GatherRoute(counts, self._placement.ep_rank, self._placement.expert_group)
