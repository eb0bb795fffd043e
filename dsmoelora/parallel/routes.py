"""Which token goes to which rank, and how sums over ranks come back to it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.parallel.transfer import Pending, Then, Transfer, start_all_gather, start_all_to_all, unchanged


class GatherRoute:
    """Every token to every rank; shapes depend on the ranks' numbers of tokens alone.

    Args:
        num_tokens: T of each rank of the group; shorter ones are padded
        ep_rank: place of this rank in the group
        group: process group
    """

    def __init__(self, num_tokens: list[int], ep_rank: int, group: Any) -> None:
        self.longest, self._own, self._group = max(num_tokens), num_tokens[ep_rank], group
        self._num_ranks = len(num_tokens)
        self._counts = [self.longest] * self._num_ranks

    def pad(self, x_TX: Tensor) -> Tensor:
        """(T, X) -> (longest, X), zeros behind."""
        return x_TX if self._own == self.longest else pad(x_TX, (0, 0, 0, self.longest - self._own))

    def send(self, x_TX: Tensor) -> Pending:
        """(T, X) -> (P * longest, X), by rank."""
        return start_all_gather(self.pad(x_TX), self._group, self._num_ranks)

    def sum_back(self, y_NX: Tensor) -> Pending:
        """A reduce-scatter (N, X) -> (T, X): pieces to their ranks, which add them up in fp32 and round once."""

        def add_up(back_NX: Tensor) -> Tensor:
            return back_NX.unflatten(0, (self._num_ranks, self.longest)).sum(0)[: self._own]

        return self.swap(y_NX, add_up)

    def swap(self, y_NX: Tensor, then: Then = unchanged) -> Pending:
        """(P * longest, X) by destination -> the same by source."""
        return start_all_to_all(y_NX, self._counts, self._counts, self._group, then)


class ChosenRoute:
    """Each token to the ranks where it is wanted; as many rows travel as are wanted.

    Args:
        wanted_TP: bool, where
        counts_SP: rows from rank S to rank P, for all pairs of ranks of the group
        send, receive: the same of this rank on the host: rows for each rank, rows from each rank
        group: process group

    Attributes:
        ranks_N, tokens_N: where each row goes, and of which token it is; by rank, then by token
    """

    def __init__(self, wanted_TP: Tensor, counts_SP: Tensor, send: list[int], receive: list[int], group: Any) -> None:
        self.wanted_TP, self.counts_SP = wanted_TP, counts_SP
        self._send, self._receive, self._group = send, receive, group
        self.ranks_N, self.tokens_N = _true_places(wanted_TP.t(), sum(send))

    def send(self, x_TX: Tensor) -> Pending:
        """(T, X) -> (M, X), by source rank, then by token."""
        return self.send_rows(x_TX.index_select(0, self.tokens_N))

    def sum_back(self, y_MX: Tensor) -> Pending:
        """(M, X) -> (T, X): for each token of this rank the sum over all ranks it was sent to, in their order.

        Sums are of fp32 inside and rounded once.
        """
        return self.send_rows_back(y_MX, self._add_up)

    def send_rows(self, x_NX: Tensor) -> Pending:
        """(N, X), a row each -> (M, X)."""
        return start_all_to_all(x_NX, self._send, self._receive, self._group)

    def send_rows_back(self, y_MX: Tensor, then: Then = unchanged) -> Pending:
        """(M, X) -> (N, X)."""
        return start_all_to_all(y_MX, self._receive, self._send, self._group, then)

    def _add_up(self, back_NX: Tensor) -> Tensor:
        rows_N, first_T = self._rows_by_token
        return embedding_bag(rows_N, back_NX, first_T, mode="sum")

    @cached_property
    def _rows_by_token(self) -> tuple[Tensor, Tensor]:
        """Rows in the order of their tokens, and where those of each token begin."""
        num_rows_T = self.wanted_TP.sum(1)
        return self.tokens_N.argsort(stable=True), num_rows_T.cumsum(0) - num_rows_T


def _true_places(mask: Tensor, count: int) -> tuple[Tensor, ...]:
    """`mask.nonzero(as_tuple=True)` where the host knows how many there are, and does not wait to be told."""
    if not count:  # older kernels of CUDA fail on a mask without numbers
        return tuple(torch.zeros(mask.dim(), 0, dtype=torch.int64, device=mask.device))
    return mask.nonzero_static(size=count).unbind(1)


def rows_on_host(counts_SKP: Tensor) -> list[list[list[int]]]:
    """Rows from each rank, by route, to each rank; the host waits for them."""
    counts: list[list[list[int]]] = counts_SKP.tolist()
    return counts


def chosen_routes(wanted: list[Tensor], placement: ExpertPlacement) -> list[ChosenRoute]:
    """Routes whose numbers of rows are told to all ranks and to the host at once: its one wait (collective).

    Args:
        wanted: for each route bool (T, P), where tokens of this rank are wanted
        placement: of ranks and experts
    """
    own_KP = torch.stack([wanted_TP.sum(0, dtype=torch.int32) for wanted_TP in wanted])
    counts_SKP = (
        start_all_gather(own_KP, placement.expert_group, placement.ep_size).wait().unflatten(0, (placement.ep_size, -1))
    )
    on_host = rows_on_host(counts_SKP)
    me = placement.ep_rank
    return [
        ChosenRoute(
            wanted_TP, counts_SKP[:, k], on_host[me][k], [source[k][me] for source in on_host], placement.expert_group
        )
        for k, wanted_TP in enumerate(wanted)
    ]


class TokenPool:
    """The tokens of one input that lie on other ranks for any of the layers that read it, and those that lie here.

    Args:
        x_TD: this rank's tokens
        placement: of ranks and experts
    """

    def __init__(self, x_TD: Tensor, placement: ExpertPlacement) -> None:
        self._x_TD, self._placement = x_TD, placement
        device = x_TD.device
        self._row_TP = torch.full((x_TD.shape[0], placement.ep_size), -1, device=device)  # of each token in each pool
        self._num_rows_P = torch.zeros(placement.ep_size, dtype=torch.int64, device=device)  # of each rank's pool
        self._coming: list[Transfer] = []
        self._rows_MD: Tensor | None = None
        self._places: dict[ChosenRoute, Pending | None] = {}  # of a route's rows in the pool; None for all of them
        self._taken: dict[ChosenRoute, Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was sent yet."""
        return not self._places

    @property
    def num_routes(self) -> int:
        """Decisions whose tokens are here or under way."""
        return len(self._places)

    def route(self, wanted_TP: Tensor) -> ChosenRoute:
        """A way for a layer's decision; what it wants and is not there yet starts (collective, the host waits)."""
        if self.is_empty:
            (route,) = chosen_routes([wanted_TP], self._placement)
            self._serve(route, route)
        else:
            route, missing = chosen_routes([wanted_TP, self.missing(wanted_TP)], self._placement)
            self._serve(route, missing)
        return route

    def bring(self, route: ChosenRoute) -> None:
        """Start what the way of another input's decision wants here too (collective)."""
        if route in self._places:
            return
        missing = route
        if not self.is_empty:
            (missing,) = chosen_routes([self.missing(route.wanted_TP)], self._placement)
        self._serve(route, missing)

    def take(self, route: ChosenRoute) -> Tensor:
        """(M, D): the tokens that a route brings, in its order."""
        if route not in self._taken:
            come = [transfer.result() for transfer in self._coming]
            self._coming.clear()
            self._rows_MD = come[0] if self._rows_MD is None else torch.cat((self._rows_MD, *come))
            places = self._places[route]
            self._taken[route] = self._rows_MD if places is None else self._rows_MD.index_select(0, places.wait())
        return self._taken[route]

    def missing(self, wanted_TP: Tensor) -> Tensor:
        """(T, P): what is wanted and neither there nor under way."""
        return wanted_TP & (self._row_TP < 0)

    def _serve(self, route: ChosenRoute, missing: ChosenRoute) -> None:
        is_first = self.is_empty
        first_P = self._num_rows_P + missing.counts_SP[: self._placement.ep_rank].sum(0)
        new_TP = missing.wanted_TP
        self._row_TP = torch.where(new_TP, first_P + new_TP.cumsum(0) - 1, self._row_TP)
        self._num_rows_P = self._num_rows_P + missing.counts_SP.sum(0)
        self._coming.append(Transfer(self._x_TD, missing.send, missing.sum_back))
        # what the first one brings is the pool, in its order
        at_N = None if is_first else self._row_TP[route.tokens_N, route.ranks_N].int()
        self._places[route] = None if at_N is None else route.send_rows(at_N)
