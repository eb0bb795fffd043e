"""Tokens travel to the experts of other ranks, and the sums of their outputs come back.

Two ways. Below, T is the number of tokens of a rank, P the ranks of an expert-parallel group, E the experts, L = E / P
those of a rank, K those of a token, n the layers that read the same input (D features, O outputs each), `b` the bytes
of an activation. Bytes are what a rank puts into its collectives in a forward pass, its own part included (`(P-1)/P`
of it leaves the rank); the backward pass moves the same once more, the counts of tokens aside.

- `gather`: all tokens to all ranks of the group.

      P T (D b + n (4 L + O b))

- `all_to_all`: a token goes once to each rank that holds at least one of its K experts, never K times. With experts
  chosen at random a given rank is one of these with probability `q = 1 - C(E - L, K) / C(E, K)`, and wanted there by
  at least one of n layers with `q_n = 1 - (1 - q)^n`. The layers after the first send places of tokens that are there.

      P T (q_n D b + n q (4 L + O b) + (n - 1) q 4) + 8 P (2 n - 1)

`auto` takes the way with fewer bytes by these formulas for n = 1: `all_to_all`, unless a token's experts are nearly
sure to lie on all ranks.
"""

from __future__ import annotations

from math import comb
from typing import Any, Literal, Protocol

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters.context import LocalExperts
from dsmoelora.adapters.shared_input import SharedInput
from dsmoelora.parallel.layout import ExpertLayout

# names in the summary of DeepSpeed's comms logger; it counts an all-gather by what one rank puts in
GATHER_LOG, ALL_TO_ALL_LOG = "token_exchange_all_gather", "token_exchange_all_to_all"
_NOT_SELECTED = -1.0  # gates are never negative, so one number says both whether and how much


class Route(Protocol):
    """A way of T tokens of this rank to N places on the ranks of the group, and back."""

    def send(self, x_TX: Tensor) -> Tensor:
        """(T, X) of this rank -> (N, X), what lies here of all ranks."""

    def sum_back(self, y_NX: Tensor) -> Tensor:
        """(N, X) -> (T, X): for each token of this rank, the sum over all places it was sent to (fp32 inside)."""


class Dispatch(torch.autograd.Function):
    """Tokens to where they are wanted; the gradient comes back as a sum."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, route: Route) -> Tensor:
        """(T, X) -> (N, X)."""
        ctx.route = route
        return route.send(x_TX)

    @staticmethod
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor, None]:
        """(N, X) -> (T, X)."""
        return ctx.route.sum_back(grad_NX.contiguous()), None


class Combine(torch.autograd.Function):
    """Partial outputs back to their tokens, summed; the gradient goes out again to all of them."""

    @staticmethod
    def forward(ctx: Any, y_NX: Tensor, route: Route) -> Tensor:
        """(N, X) -> (T, X)."""
        ctx.route = route
        return route.sum_back(y_NX.contiguous())

    @staticmethod
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None]:
        """(T, X) -> (N, X)."""
        return ctx.route.send(grad_TX.contiguous()), None


class AllToAll(torch.autograd.Function):
    """Blocks of rows to and from every rank of the group."""

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        """Rows ordered by destination -> rows ordered by source.

        Args:
            x_NX: (sum(send), X)
            send: rows for each rank
            receive: rows from each rank
            group: process group
        """
        ctx.counts, ctx.group = (send, receive), group
        return _all_to_all(x_NX, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None, None, None]:
        """The same way back."""
        send, receive = ctx.counts
        return _all_to_all(grad_MX.contiguous(), receive, send, ctx.group), None, None, None


def _all_to_all(x_NX: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = x_NX.new_empty(sum(receive), *x_NX.shape[1:])
    dist.all_to_all_single(
        received, x_NX, output_split_sizes=receive, input_split_sizes=send, group=group, log_name=ALL_TO_ALL_LOG
    )
    return received


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

    def pad(self, x_TX: Tensor, value: float = 0.0) -> Tensor:
        """(T, X) -> (longest, X)."""
        if self._own == self.longest:
            return x_TX.contiguous()
        return torch.nn.functional.pad(x_TX, (0, 0, 0, self.longest - self._own), value=value)

    def send(self, x_TX: Tensor) -> Tensor:
        """(T, X) -> (P * longest, X), by rank."""
        gathered = x_TX.new_empty(self._num_ranks * self.longest, x_TX.shape[1])
        dist.all_gather_into_tensor(gathered, self.pad(x_TX), group=self._group, log_name=GATHER_LOG)
        return gathered

    def sum_back(self, y_NX: Tensor) -> Tensor:
        """A reduce-scatter: pieces to their ranks, which add them up in fp32 and round once."""
        counts = [self.longest] * self._num_ranks
        pieces = _all_to_all(y_NX, counts, counts, self._group)
        return pieces.view(self._num_ranks, self.longest, y_NX.shape[1]).sum(0)[: self._own]


class ChosenRoute:
    """Each token to the ranks where it is wanted; as many rows travel as are wanted.

    Args:
        wanted_TP: bool, where
        group: process group
    """

    def __init__(self, wanted_TP: Tensor, group: Any) -> None:
        self._group, self._num_tokens = group, wanted_TP.shape[0]
        self.ranks_N, self.tokens_N = wanted_TP.t().nonzero(as_tuple=True)  # by rank, then by token
        send_P = wanted_TP.sum(0)
        receive_P = torch.empty_like(send_P)
        dist.all_to_all_single(receive_P, send_P, group=group, log_name=ALL_TO_ALL_LOG)
        self.send_counts, self.receive_counts = torch.stack((send_P, receive_P)).tolist()

    def send(self, x_TX: Tensor) -> Tensor:
        """(T, X) -> (N, X), by source rank, then by token."""
        return _all_to_all(x_TX[self.tokens_N], self.send_counts, self.receive_counts, self._group)

    def sum_back(self, y_NX: Tensor) -> Tensor:
        """(N, X) -> (T, X); a rank at a time, so that no two rows of an addition meet and the order is fixed."""
        back_NX = _all_to_all(y_NX, self.receive_counts, self.send_counts, self._group)
        total_TX = y_NX.new_zeros(self._num_tokens, y_NX.shape[1], dtype=torch.float32)
        pieces = back_NX.split(self.send_counts)
        for tokens, piece in zip(self.tokens_N.split(self.send_counts), pieces, strict=True):
            total_TX.index_add_(0, tokens, piece.float())
        return total_TX.to(y_NX.dtype)


def gather_bytes(num_tokens: int, layout: ExpertLayout, d: int, o: int, itemsize: int, num_layers: int = 1) -> float:
    """Bytes of `gather` in a forward pass of `num_layers` layers with one input; see the formula above."""
    per_token = d * itemsize + num_layers * (4 * layout.num_local_experts + o * itemsize)
    return float(layout.ep_size * num_tokens * per_token)


def all_to_all_bytes(
    num_tokens: int, layout: ExpertLayout, d: int, o: int, itemsize: int, top_k: int, num_layers: int = 1
) -> float:
    """Expected bytes of `all_to_all` likewise, for experts chosen at random."""
    num_experts, num_local = layout.num_experts, layout.num_local_experts
    q = 1 - comb(num_experts - num_local, top_k) / comb(num_experts, top_k)
    q_n = 1 - (1 - q) ** num_layers
    per_token = q_n * d * itemsize + num_layers * q * (4 * num_local + o * itemsize) + (num_layers - 1) * q * 4
    return layout.ep_size * (num_tokens * per_token + 8 * (2 * num_layers - 1))


class TokenExchange:
    """The exchange of one model's adapted layers.

    Args:
        layout: of ranks and experts
        kind: which way
        top_k: experts of a token at most

    Attributes:
        num_tokens: tokens of each rank of the group in the micro-batch at hand, from `announce`
        num_rows: rows that they lie in, likewise
    """

    def __init__(self, layout: ExpertLayout, kind: Literal["auto", "gather", "all_to_all"], top_k: int) -> None:
        self.layout, self.kind, self.top_k = layout, kind, top_k
        self.num_tokens: list[int] = []
        self.num_rows: list[int] = []

    def announce(self, num_tokens: int, num_rows: int) -> None:
        """Tell the other ranks of the group what this rank has (collective, once per forward pass).

        The host waits for the answer, which decides the shapes of all that follows.
        """
        own = torch.tensor([num_tokens, num_rows], device=get_accelerator().current_device_name())
        everyone = own.new_empty(2 * self.layout.ep_size)
        dist.all_gather_into_tensor(everyone, own, group=self.layout.expert_group)
        self.num_tokens, self.num_rows = (list(one) for one in zip(*everyone.view(-1, 2).tolist(), strict=True))

    def announce_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`announce` of the tokens that a model is called with; a pre-forward hook of it."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        self.announce(tokens.numel(), len(tokens))

    def kind_for(self, in_features: int, out_features: int, itemsize: int) -> str:
        """`gather` or `all_to_all` for a layer, the same on all ranks."""
        if self.kind != "auto":
            return self.kind
        # the same answer for any number of tokens, but for the few bytes of counts
        sizes = (max(self.num_tokens), self.layout, in_features, out_features, itemsize)
        return "all_to_all" if all_to_all_bytes(*sizes, self.top_k) < gather_bytes(*sizes) else "gather"

    def __call__(
        self,
        shared: SharedInput,
        x_TD: Tensor,
        gate_TE: Tensor,
        selected_TE: Tensor,
        experts: LocalExperts,
        out_features: int,
    ) -> Tensor:
        """See `adapters.context.Exchange`."""
        own = self.num_tokens[self.layout.ep_rank] if self.num_tokens else None
        assert x_TD.shape[0] == own, f"a layer has {x_TD.shape[0]} tokens, but {own} were announced"
        packed_TE = torch.where(selected_TE, gate_TE, _NOT_SELECTED)
        if self.kind_for(x_TD.shape[1], out_features, x_TD.element_size()) == "gather":
            return self._gather(shared, x_TD, packed_TE, experts)
        return self._all_to_all(shared, x_TD, packed_TE, selected_TE, experts)

    def of_all_experts(self, own_LX: Tensor) -> Tensor:
        """See `adapters.context.Exchange`."""
        counts = [self.layout.num_local_experts] * self.layout.ep_size
        return Dispatch.apply(own_LX, GatherRoute(counts, self.layout.ep_rank, self.layout.expert_group))

    def _gather(self, shared: SharedInput, x_TD: Tensor, packed_TE: Tensor, experts: LocalExperts) -> Tensor:
        group, num_ranks = self.layout.expert_group, self.layout.ep_size
        route = GatherRoute(self.num_tokens, self.layout.ep_rank, group)
        x_ND = shared.once("gathered", lambda: Dispatch.apply(x_TD, route))
        padded_TE = route.pad(packed_TE, _NOT_SELECTED)
        by_rank_NL = padded_TE.unflatten(1, (num_ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        counts = [route.longest] * num_ranks
        packed_NL = AllToAll.apply(by_rank_NL, counts, counts, group)
        return Combine.apply(experts(x_ND, *_unpacked(packed_NL)), route)

    def _all_to_all(
        self, shared: SharedInput, x_TD: Tensor, packed_TE: Tensor, selected_TE: Tensor, experts: LocalExperts
    ) -> Tensor:
        num_ranks = self.layout.ep_size
        wanted_TP = selected_TE.unflatten(1, (num_ranks, -1)).any(-1)
        pool: TokenPool = shared.once("pool", lambda: TokenPool(x_TD, num_ranks, self.layout.expert_group))
        is_first = pool.is_empty
        added = pool.add(wanted_TP)
        # what the first reader wants is what was added for it, in the same order
        route = added if is_first else ChosenRoute(wanted_TP, self.layout.expert_group)
        packed_NL = packed_TE.unflatten(1, (num_ranks, -1))[route.tokens_N, route.ranks_N]
        if not is_first:
            slots_N = pool.slots(route).to(packed_NL.dtype)  # fp32 holds them exactly
            packed_NL = torch.cat((packed_NL, slots_N.unsqueeze(1)), dim=1)
        packed_NL = AllToAll.apply(packed_NL, route.send_counts, route.receive_counts, self.layout.expert_group)
        x_ND = pool.rows
        if not is_first:
            x_ND = pool.take(packed_NL[:, -1].detach().long(), route)
            packed_NL = packed_NL[:, :-1]
        return Combine.apply(experts(x_ND, *_unpacked(packed_NL)), route)


def _unpacked(packed_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Gates, 0 where not selected, and what is selected."""
    selected_NL = packed_NL >= 0
    return packed_NL.where(selected_NL, 0.0), selected_NL


class TokenPool:
    """The tokens of one input that have come to this rank for any of the layers that read it.

    Args:
        x_TD: this rank's tokens
        num_ranks: P
        group: process group

    Attributes:
        rows: (M, D) what lies here, of all ranks
    """

    def __init__(self, x_TD: Tensor, num_ranks: int, group: Any) -> None:
        self._x_TD, self._group = x_TD, group
        self._slot_TP = torch.full((x_TD.shape[0], num_ranks), -1, device=x_TD.device)  # place among rows sent there
        self._sent_P = torch.zeros(num_ranks, dtype=torch.int64, device=x_TD.device)
        self._places = [torch.empty(0, dtype=torch.int64, device=x_TD.device)] * num_ranks  # of rows, by source
        self.rows = x_TD.new_empty(0, x_TD.shape[1])
        self.is_empty = True

    def add(self, wanted_TP: Tensor) -> ChosenRoute:
        """Send what is wanted and not there yet (collective)."""
        new_TP = wanted_TP & (self._slot_TP < 0)
        route = ChosenRoute(new_TP, self._group)
        self._slot_TP = torch.where(new_TP, self._sent_P + new_TP.cumsum(0) - 1, self._slot_TP)
        self._sent_P = self._sent_P + new_TP.sum(0)
        start = self.rows.shape[0]
        for source, count in enumerate(route.receive_counts):
            here = torch.arange(start, start + count, device=self._slot_TP.device)
            self._places[source] = torch.cat((self._places[source], here))
            start += count
        arrived = Dispatch.apply(self._x_TD, route)
        self.rows = arrived if self.is_empty else torch.cat((self.rows, arrived))
        self.is_empty = False
        return route

    def slots(self, route: ChosenRoute) -> Tensor:
        """(N,) int64: where, among the rows this rank has sent to a rank, the tokens of a route lie there."""
        return self._slot_TP[route.tokens_N, route.ranks_N]

    def take(self, slots_N: Tensor, route: ChosenRoute) -> Tensor:
        """(N, D): the rows that came over a route by their slots, in its order."""
        by_source = zip(self._places, slots_N.split(route.receive_counts), strict=True)
        return self.rows.index_select(0, torch.cat([places[slots] for places, slots in by_source]))
