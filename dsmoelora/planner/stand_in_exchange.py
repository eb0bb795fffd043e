"""The token exchange of one rank without the others: nothing travels, and sizes are written down.

The project's own exchange runs. What it would hear from other ranks is taken to be what experts chosen at random give
(`parallel/exchange.py`): a token is wanted on a rank with probability q, so of T tokens `q T` rows go to each rank, and
`q (1 - q)^k T` of them are not there yet after k layers with the same input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import comb
from typing import Any
from unittest import mock

from torch import Tensor

from dsmoelora.parallel import exchange, expert_group, routes, transfer
from dsmoelora.parallel.exchange import TokenExchange
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.parallel.routes import TokenPool

Sent = tuple[bool, str]  # in the backward pass or not; the collective


def share_wanted(placement: ExpertPlacement, top_k: int) -> float:
    """q: how probable it is that one of a token's experts lies on a given rank, for experts chosen at random."""
    num_experts, num_local = placement.num_experts, placement.num_local_experts
    return 1 - comb(num_experts - num_local, top_k) / comb(num_experts, top_k)


class LoneRank:
    """Stands in for `deepspeed.comm` and for the other ranks of an expert-parallel group.

    Args:
        exchange: of the model's layers
        num_tokens: T, of each rank
        num_rows: that they lie in

    Attributes:
        messages: collectives
        num_bytes: of their whole tensors
        in_backward: whether the backward pass has begun
    """

    def __init__(self, exchange: TokenExchange, num_tokens: int, num_rows: int) -> None:
        placement = exchange.placement
        exchange.num_tokens, exchange.num_rows = [num_tokens] * placement.ep_size, [num_rows] * placement.ep_size
        self.messages: Counter[Sent] = Counter()
        self.num_bytes: Counter[Sent] = Counter()
        self.in_backward = False
        self._num_ranks, self._num_tokens = placement.ep_size, num_tokens
        self._share, self._missing_share = share_wanted(placement, exchange.top_k), 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collectives of the exchange come here inside the block."""
        missing = TokenPool.missing

        def note_missing(pool: TokenPool, wanted_TP: Tensor) -> Tensor:
            self._missing_share = self._share * (1 - self._share) ** pool.num_routes
            return missing(pool, wanted_TP)

        with ExitStack() as stack:
            for module in (exchange, expert_group, transfer):
                stack.enter_context(mock.patch.object(module, "dist", self))
            stack.enter_context(mock.patch.object(routes, "rows_on_host", self._rows))
            stack.enter_context(mock.patch.object(TokenPool, "missing", note_missing))
            yield

    def all_to_all_single(self, _: Tensor, sent: Tensor, **__: Any) -> LoneRank:
        """As of `deepspeed.comm`."""
        return self._note("all_to_all", sent.nbytes)

    def all_gather_into_tensor(self, gathered: Tensor, _: Tensor, **__: Any) -> LoneRank:
        """As of `deepspeed.comm`."""
        return self._note("all_gather", gathered.nbytes)

    def all_reduce(self, tensor: Tensor, **_: Any) -> LoneRank:
        """As of `deepspeed.comm`."""
        return self._note("all_reduce", tensor.nbytes)

    def wait(self) -> None:
        """Of a handle: all is over at once."""

    def _note(self, op: str, num_bytes: int) -> LoneRank:
        self.messages[self.in_backward, op] += 1
        self.num_bytes[self.in_backward, op] += num_bytes
        return self

    def _rows(self, counts_SKP: Tensor) -> list[list[list[int]]]:
        """See `routes.rows_on_host`: of a decision, and behind it what of it is not there yet; or that alone."""
        shares = [self._share] * counts_SKP.shape[1]
        if self._missing_share:
            shares[-1], self._missing_share = self._missing_share, 0.0
        by_route = [[round(share * self._num_tokens)] * self._num_ranks for share in shares]
        return [by_route] * self._num_ranks
