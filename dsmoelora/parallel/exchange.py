"""Tokens travel to the experts of other ranks, and the sums of their outputs come back.

Two ways. Below, T is the number of tokens of a rank, P the ranks of an expert-parallel group, E the experts, L = E / P
those of a rank, K those of a token, n the layers that read the same input (D features, O outputs each), `b` the bytes
of an activation. Bytes are what a rank puts into its collectives in a forward pass, its own part included (`(P-1)/P`
of it leaves the rank); the backward pass moves the same once more, counts and places aside.

- `gather`: all tokens to all ranks of the group.

      P T (D b + n (4 L + O b))

- `all_to_all`: a token goes once to each rank that holds at least one of its K experts, never K times. With experts
  chosen at random a given rank is one of these with probability `q = 1 - C(E - L, K) / C(E, K)`, and wanted there by
  at least one of n layers with `q_n = 1 - (1 - q)^n`. The layers after the first send places of tokens that are there.

      P T (q_n D b + n q (4 L + O b) + (n - 1) q 4) + 4 P^2 (2 n - 1)

  How many rows travel between which ranks is told to all of them and to the host, once for a router's decision.

`auto` takes the way with fewer bytes by these formulas for n = 1: `all_to_all`, unless a token's experts are nearly
sure to lie on all ranks. Layers that follow one decision (a router of a block) send its gates once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Any, Literal

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters.context import LocalExperts
from dsmoelora.adapters.shared_input import Once
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.parallel.routes import ChosenRoute, GatherRoute, TokenPool
from dsmoelora.parallel.transfer import Transfer


def gather_bytes(
    num_tokens: int, placement: ExpertPlacement, d: int, o: int, itemsize: int, num_layers: int = 1
) -> float:
    """Bytes of `gather` in a forward pass of `num_layers` layers with one input; see the formula above."""
    per_token = d * itemsize + num_layers * (4 * placement.num_local_experts + o * itemsize)
    return float(placement.ep_size * num_tokens * per_token)


def all_to_all_bytes(
    num_tokens: int, placement: ExpertPlacement, d: int, o: int, itemsize: int, top_k: int, num_layers: int = 1
) -> float:
    """Expected bytes of `all_to_all` likewise, for experts chosen at random."""
    num_experts, num_local = placement.num_experts, placement.num_local_experts
    q = 1 - comb(num_experts - num_local, top_k) / comb(num_experts, top_k)
    q_n = 1 - (1 - q) ** num_layers
    per_token = q_n * d * itemsize + num_layers * q * (4 * num_local + o * itemsize) + (num_layers - 1) * q * 4
    counts = 4 * placement.ep_size * (2 * num_layers - 1)
    return placement.ep_size * (num_tokens * per_token + counts)


class TokenExchange:
    """The exchange of one model's adapted layers.

    Args:
        placement: of ranks and experts
        kind: which way
        top_k: experts of a token at most

    Attributes:
        num_tokens: tokens of each rank of the group in the micro-batch at hand, from `announce`
        num_rows: rows that they lie in, likewise
    """

    def __init__(self, placement: ExpertPlacement, kind: Literal["auto", "gather", "all_to_all"], top_k: int) -> None:
        self.placement, self.kind, self.top_k = placement, kind, top_k
        self.num_tokens: list[int] = []
        self.num_rows: list[int] = []

    def announce(self, num_tokens: int, num_rows: int) -> None:
        """Tell the other ranks of the group what this rank has (collective, once per forward pass).

        The host waits for the answer, which decides the shapes of all that follows.
        """
        own = torch.tensor([num_tokens, num_rows], device=get_accelerator().current_device_name())
        everyone = own.new_empty(2 * self.placement.ep_size)
        dist.all_gather_into_tensor(everyone, own, group=self.placement.expert_group)
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
        sizes = (max(self.num_tokens), self.placement, in_features, out_features, itemsize)
        return "all_to_all" if all_to_all_bytes(*sizes, self.top_k) < gather_bytes(*sizes) else "gather"

    def depart(self, of_input: Once, of_decision: Once, x_TD: Tensor, gate_TE: Tensor, out_features: int) -> Visit:
        """See `adapters.context.Exchange`."""
        own = self.num_tokens[self.placement.ep_rank] if self.num_tokens else None
        assert x_TD.shape[0] == own, f"a layer has {x_TD.shape[0]} tokens, but {own} were announced"
        if self.kind_for(x_TD.shape[1], out_features, x_TD.element_size()) == "gather":
            return self._gather(of_input, of_decision, x_TD, gate_TE)
        return self._all_to_all(of_input, of_decision, x_TD, gate_TE)

    def of_all_experts(self, own_LX: Tensor) -> Tensor:
        """See `adapters.context.Exchange`."""
        counts = [self.placement.num_local_experts] * self.placement.ep_size
        route = GatherRoute(counts, self.placement.ep_rank, self.placement.expert_group)
        return Transfer(own_LX, route.send, route.sum_back).result()

    def _gather(self, of_input: Once, of_decision: Once, x_TD: Tensor, gate_TE: Tensor) -> Visit:
        route = GatherRoute(self.num_tokens, self.placement.ep_rank, self.placement.expert_group)
        have_left = "tokens" in of_input
        tokens = of_input("tokens", lambda: Transfer(x_TD, route.send, route.sum_back))

        def send_gates() -> Transfer:
            by_rank_PTL = self._by_rank(route.pad(gate_TE)).transpose(0, 1)
            return Transfer(by_rank_PTL.flatten(0, 1), route.swap, route.swap)

        return Visit(tokens.result, of_decision("gates for all", send_gates), route, have_left)

    def _all_to_all(self, of_input: Once, of_decision: Once, x_TD: Tensor, gate_TE: Tensor) -> Visit:
        have_left = "pool" in of_input
        pool = of_input("pool", lambda: TokenPool(x_TD, self.placement))
        route = of_decision("route", lambda: pool.route((self._by_rank(gate_TE) != 0).any(-1)))
        pool.bring(route)

        def send_gates() -> Transfer:
            rows_NL = self._by_rank(gate_TE)[route.tokens_N, route.ranks_N]
            return Transfer(rows_NL, route.send_rows, route.send_rows_back)

        return Visit(partial(pool.take, route), of_decision("gates for some", send_gates), route, have_left)

    def _by_rank(self, of_experts_TE: Tensor) -> Tensor:
        """(T, E) -> (T, P, L)."""
        return of_experts_TE.unflatten(1, (self.placement.ep_size, -1))


@dataclass(frozen=True)
class Visit:
    """See `adapters.context.Visit`.

    Args:
        tokens: waits for the tokens (N, D) that come to this rank
        gates: of this rank's experts (N, L) for them, 0 where not selected
        route: of the sums back to the tokens' ranks
        have_left: see `adapters.context.Visit`
    """

    tokens: Callable[[], Tensor]
    gates: Transfer
    route: GatherRoute | ChosenRoute
    have_left: bool

    def through(self, experts: LocalExperts) -> Callable[[], Tensor]:
        """See `adapters.context.Visit`."""
        gate_NL = self.gates.result()
        y_NO = experts(self.tokens(), gate_NL)
        return Transfer(y_NO, self.route.sum_back, self.route.send).result
