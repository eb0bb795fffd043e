"""The token exchange overlaps with the base layer: when it starts and is waited for, and what the host waits for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.blocking import collectives_through, waited_for
from benchmarks.layer_kernels import Kernels
from tests.conftest import PoolFactory
from tests.host_waits import host_reads

NUM_EXPERTS, TOP_K, NUM_TOKENS = 12, 3, 40
IN, HIDDEN = 10, 9
OUT = {"q": 7, "k": 5, "v": 8}  # widths tell apart whose rows travel


class Attention(nn.Module):
    """Three layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, out) for out in OUT.values())

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.cat((self.q(x_TD), self.k(x_TD), self.v(x_TD)), dim=1)


class FeedForward(nn.Module):
    """Two layers that read one input, and one that reads what they make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x_TD)) * self.up(x_TD))


@dataclass
class Ranks:
    """The part of a job that is the same on all ranks.

    Args:
        kind: which way tokens travel
        ep_size: ranks that share the experts of a layer
        style: `ffn_block` has one router for a feed-forward block
        expert: kind of expert
    """

    kind: Any
    ep_size: int = 4
    style: Any = "per_linear"
    expert: Any = "lora"


def adapted(ranks: Ranks) -> tuple[nn.Module, Tensor]:
    """A module with this rank's share of experts, none of which is zero, and this rank's tokens."""
    from dsmoelora import inject
    from dsmoelora.adapters import adapted_layers
    from dsmoelora.config import AdapterConfig, ParallelConfig, Recipe
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.exchange import TokenExchange
    from dsmoelora.parallel.zero import make_placement

    adapter = AdapterConfig(
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        r=2,
        target_modules="all-linear",
        style=ranks.style,
        expert=ranks.expert,
    )
    placement = make_placement(Recipe(adapter=adapter, parallel=ParallelConfig(ranks.ep_size, ranks.kind)))
    exchange = TokenExchange(placement, ranks.kind, TOP_K)
    torch.manual_seed(0)
    block = FeedForward() if ranks.style == "ffn_block" else Attention()
    model = nn.ModuleDict({"mlp": block})
    inject(model, adapter, placement.local_experts, exchange)
    torch.manual_seed(comm.rank())
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.experts.b)
    exchange.announce(NUM_TOKENS, num_rows=1)
    return block, torch.randn(NUM_TOKENS, IN).requires_grad_()


Event = tuple[str, int]  # what happens, and with how many numbers in a row


class Watched:
    """The handle of a collective that says when it is waited for."""

    def __init__(self, handle: Any, wait: Callable[[], None]) -> None:
        self._handle, self._say = handle, wait

    def wait(self) -> None:
        self._say()
        self._handle.wait()


@contextmanager
def watching(events: list[Event]) -> Iterator[None]:
    """Inside the block every collective leaves a note when it starts, and when somebody begins to wait for it."""

    def call(collective: Callable[..., Any], output: Tensor, tensor: Tensor, **kwargs: Any) -> Watched:
        width = tensor.shape[-1]
        events.append(("start", width))
        return Watched(collective(output, tensor, **kwargs), lambda: events.append(("wait", width)))

    with collectives_through(call):
        yield


def events_on_rank(ranks: Ranks) -> tuple[list[Event], list[Event]]:
    """Collectives and base products of a forward and of a backward pass, in their order."""
    block, x_TD = adapted(ranks)
    forward: list[Event] = []
    backward: list[Event] = []
    for name, out in OUT.items():
        base = getattr(block, name).base
        base.register_forward_hook(lambda *_, out=out: forward.append(("base", out)))
        base.register_full_backward_hook(lambda *_, out=out: backward.append(("base", out)))
    with watching(forward):
        y_TO = block(x_TD)
    with watching(backward):
        y_TO.square().sum().backward()
    return forward, backward


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_tokens_or_sums_travel_while_the_base_computes(worker_pool: PoolFactory, kind: str) -> None:
    """Tokens around the base product of the first reader, sums around those of the others; so do their gradients."""
    for forward, backward in worker_pool(4).run(events_on_rank, Ranks(kind)):
        q, *others = OUT.values()
        assert_overlap(forward, IN, q)
        after_last = [*reversed(backward)].index(("start", IN))  # the gradient of the first reader's tokens
        assert_overlap(backward[-1 - after_last :], IN, q)
        for out in others:
            assert_overlap(forward, out, out)
            assert_overlap(backward, out, out)


def assert_overlap(events: list[Event], width: int, base: int) -> None:
    """The first transfer of this width starts before a base product, and is waited for after it."""
    places = [events.index(event) for event in (("start", width), ("base", base), ("wait", width))]
    assert places == sorted(places), events


def numbers_on_rank(ranks: Ranks, is_blocking: bool) -> list[Tensor]:
    """Output and gradients."""
    block, x_TD = adapted(ranks)
    wrapped = partial(waited_for) if is_blocking else lambda collective, *args, **kwargs: collective(*args, **kwargs)
    with collectives_through(wrapped):
        y_TO = block(x_TD)
        y_TO.square().sum().backward()
    return [y_TO.detach(), x_TD.grad, *(p.grad for p in block.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "ranks",
    [
        Ranks("gather"),
        Ranks("all_to_all"),
        Ranks("gather", style="ffn_block"),
        Ranks("all_to_all", style="ffn_block"),
        Ranks("all_to_all", ep_size=2, expert="dora"),
    ],
    ids=str,
)
def test_overlapping_changes_no_bit(worker_pool: PoolFactory, ranks: Ranks) -> None:
    pool = worker_pool(4)
    overlapping, blocking = (pool.run(numbers_on_rank, ranks, is_blocking) for is_blocking in (False, True))
    for one, other in zip(overlapping, blocking, strict=True):
        assert len(one) > 2
        for ours, theirs in zip(one, other, strict=True):
            assert ours.any()
            assert torch.equal(ours, theirs)


def two_ways_on_rank() -> list[Tensor]:
    """As `numbers_on_rank` of a block whose last layer sends its tokens in another way than the first two."""
    from dsmoelora.parallel.exchange import TokenExchange

    def way(_: Any, in_features: int, *sizes: int) -> str:
        return "gather" if in_features == IN else "all_to_all"

    with mock.patch.object(TokenExchange, "kind_for", way):
        return numbers_on_rank(Ranks("auto", style="ffn_block"), is_blocking=False)


def test_layers_that_follow_one_decision_may_take_two_ways(worker_pool: PoolFactory) -> None:
    """`auto` looks at a layer's sizes."""
    pool = worker_pool(4)
    for mixed, of_one in zip(
        pool.run(two_ways_on_rank),
        pool.run(numbers_on_rank, Ranks("gather", style="ffn_block"), False),
        strict=True,
    ):
        for ours, theirs in zip(mixed, of_one, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def kept_on_rank(ranks: Ranks) -> list[bool]:
    """Which of the tokens that the experts saw are still there, after a forward pass, and after the backward pass."""
    block, x_TD = adapted(ranks)
    seen: list[weakref.ref[Tensor]] = []
    for child in block.children():
        if hasattr(child, "experts"):
            child.experts.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[1])))
    gc.disable()  # nothing may wait for it
    try:
        y_TO = block(x_TD)
        kept = [any(tokens() is not None for tokens in seen)]
        y_TO.sum().backward()
        del y_TO
        return [*kept, any(tokens() is not None for tokens in seen)]
    finally:
        gc.enable()


@pytest.mark.parametrize("style", ["per_linear", "ffn_block"])
@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_tokens_of_others_are_let_go_of(worker_pool: PoolFactory, kind: str, style: str) -> None:
    """With the backward pass: a transfer does not keep its own graph alive."""
    assert worker_pool(4).run(kept_on_rank, Ranks(kind, style=style)) == [[True, False]] * 4


def costs_on_rank(ranks: Ranks) -> tuple[list[str], int]:
    """What the host waited for in a forward and a backward pass, and how many kernels ran."""
    block, x_TD = adapted(ranks)
    with host_reads() as reads:
        block(x_TD).sum().backward()
    with Kernels() as kernels:
        block(x_TD).sum().backward()
    return reads, len(kernels.names)


@pytest.mark.parametrize(
    ("kind", "style", "num_reads"),
    [
        pytest.param("gather", "per_linear", 0, id="gather"),
        pytest.param("all_to_all", "per_linear", 3, id="three-routers"),
        pytest.param("all_to_all", "ffn_block", 1, id="one-router"),
    ],
)
def test_the_host_waits_once_for_a_routers_decision(
    worker_pool: PoolFactory, kind: str, style: str, num_reads: int
) -> None:
    """However many layers follow it, and whatever they read; and no kernel is launched for each rank of the group."""
    of_four = worker_pool(4).run(costs_on_rank, Ranks(kind, 4, style))
    of_two = worker_pool(4).run(costs_on_rank, Ranks(kind, 2, style))
    for reads, _ in (*of_four, *of_two):
        assert reads == ["tolist"] * num_reads
    assert {num_kernels for _, num_kernels in of_four} == {num_kernels for _, num_kernels in of_two}
