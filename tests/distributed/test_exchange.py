"""Tokens that travel to the experts of other ranks: values, gradients and messages, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.conftest import PoolFactory

NUM_EXPERTS, TOP_K, RANK, IN = 12, 3, 2, 10
OUTS = (7, 5, 8)  # three layers that read one input
SCALE = 1.5
RAGGED = [5, 0, 9, 2]


@dataclass
class Layer:
    """One layer over all experts, and what its routers chose for each token of all ranks."""

    gate_TE: Tensor
    selected_TE: Tensor
    a_EDR: Tensor
    b_EOR: Tensor
    weight_TO: Tensor  # of the outputs in the loss


@dataclass
class Found:
    """What comes out for some tokens and some experts: outputs by layer, gradients of the input and of each layer."""

    y: list[Tensor]
    x_grad: Tensor
    gate_grads: list[Tensor]
    a_grads: list[Tensor]
    b_grads: list[Tensor]


def problem(num_tokens: int, all_on: int | None = None) -> tuple[Tensor, list[Layer]]:
    """Input (T, D) and layers, in fp64; `all_on` sends every token to this expert and no other."""
    torch.manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, IN).double()
    layers = []
    for out in OUTS:
        logits_TE = torch.randn(num_tokens, NUM_EXPERTS).double()
        if all_on is None:
            chosen_TK = logits_TE.topk(TOP_K).indices
        else:
            chosen_TK = torch.full((num_tokens, 1), all_on)
        selected_TE = torch.zeros(num_tokens, NUM_EXPERTS, dtype=torch.bool).scatter(1, chosen_TK, True)
        gate_TE = logits_TE.sigmoid().where(selected_TE, 0.0)
        factors = [torch.randn(NUM_EXPERTS, rows, RANK).double() for rows in (IN, out)]
        layers.append(Layer(gate_TE, selected_TE, *factors, torch.randn(num_tokens, out).double()))
    return x_TD, layers


def expected(x_TD: Tensor, layers: list[Layer]) -> Found:
    """`y = s sum_e gate_e (x a_e) b_e^T` as it stands, in fp64, for all tokens and experts on one process."""
    x_TD = x_TD.clone().requires_grad_()
    leaves = [[t.clone().requires_grad_() for t in (layer.gate_TE, layer.a_EDR, layer.b_EOR)] for layer in layers]
    ys = [SCALE * torch.einsum("te,td,edr,eor->to", gate, x_TD, a, b) for gate, a, b in leaves]
    sum((y * layer.weight_TO).sum() for y, layer in zip(ys, layers, strict=True)).backward()  # type: ignore[union-attr]
    gates, a_grads, b_grads = ([leaf.grad for leaf in some] for some in zip(*leaves, strict=True))
    # an expert that is not selected says nothing about its gate
    gate_grads = [grad.where(layer.selected_TE, 0.0) for grad, layer in zip(gates, layers, strict=True)]
    return Found([y.detach() for y in ys], x_TD.grad, gate_grads, a_grads, b_grads)


@dataclass
class Message:
    """A collective of the exchange as a rank calls it.

    Args:
        name: of the function
        rows: that this rank sends to each rank
        width: numbers in a row
        num_bytes: that this rank puts in
    """

    name: str
    rows: list[int]
    width: int
    num_bytes: int


@contextmanager
def listening(messages: list[Message]) -> Iterator[None]:
    """Inside the block every collective of `parallel.exchange` leaves a note, and goes through."""
    from dsmoelora.parallel import exchange

    to_all, gather = exchange.dist.all_to_all_single, exchange.dist.all_gather_into_tensor

    def all_to_all_single(output: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        messages.append(Message("all_to_all", kwargs.get("input_split_sizes", []), tensor[:1].numel(), tensor.nbytes))
        return to_all(output, tensor, **kwargs)

    def all_gather_into_tensor(output: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        num_ranks = output.shape[0] // max(1, tensor.shape[0])
        messages.append(Message("gather", [len(tensor)] * num_ranks, tensor[:1].numel(), num_ranks * tensor.nbytes))
        return gather(output, tensor, **kwargs)

    with (
        mock.patch.object(exchange.dist, "all_to_all_single", all_to_all_single),
        mock.patch.object(exchange.dist, "all_gather_into_tensor", all_gather_into_tensor),
    ):
        yield


@dataclass
class OnRank:
    """What one rank brings home, and its messages of the forward and the backward pass."""

    found: Found
    forward: list[Message]
    backward: list[Message]


def exchange_on_rank(num_tokens: list[int], kind: Any, ep_size: int, all_on: int | None) -> OnRank:
    """The experts of this rank and the tokens of this rank, in fp32, out of the problem of all."""
    from dsmoelora.adapters.experts.function import Mixture, RoutedExperts
    from dsmoelora.adapters.shared_input import Once
    from dsmoelora.config import AdapterConfig, ParallelConfig, Recipe
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.exchange import TokenExchange
    from dsmoelora.parallel.zero import make_placement

    adapter = AdapterConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, r=RANK)
    placement = make_placement(Recipe(adapter=adapter, parallel=ParallelConfig(ep_size, kind)))
    x_TD, layers = problem(sum(num_tokens), all_on)
    first = sum(num_tokens[: comm.rank()])
    own = slice(first, first + num_tokens[comm.rank()])
    mine = slice(placement.local_experts.start, placement.local_experts.stop)

    exchange = TokenExchange(placement, kind, TOP_K)
    exchange.announce(num_tokens[comm.rank()], num_rows=1)
    x = x_TD[own].float().requires_grad_()
    of_input, ys, leaves, loss = Once(), [], [], torch.zeros(())
    forward: list[Message] = []
    with listening(forward):
        for layer in layers:
            gate = layer.gate_TE[own].float().requires_grad_()
            a, b = (factor[mine].float().requires_grad_() for factor in (layer.a_EDR, layer.b_EOR))

            def experts(x_ND: Tensor, gate_NL: Tensor, a: Tensor = a, b: Tensor = b) -> Any:
                gates = None, x_ND, gate_NL, None
                return RoutedExperts.apply(Mixture(SCALE), None, *gates, a, b, None, None)

            y = exchange.depart(of_input, Once(), x, gate, b.shape[1]).through(experts)()
            ys.append(y.detach())
            leaves.append((gate, a, b))
            loss = loss + (y * layer.weight_TO[own].float()).sum()
    backward: list[Message] = []
    with listening(backward):
        loss.backward()
    assert x.grad is not None
    gates, a_grads, b_grads = ([leaf.grad for leaf in some] for some in zip(*leaves, strict=True))
    gate_grads = [g.where(layer.selected_TE[own], 0.0) for g, layer in zip(gates, layers, strict=True)]
    return OnRank(Found(ys, x.grad, gate_grads, a_grads, b_grads), forward, backward)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Within rounding, as a share of the largest number."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
@pytest.mark.parametrize(
    ("num_tokens", "ep_size", "all_on"),
    [
        pytest.param([4, 4, 4, 4], 4, None, id="even"),
        pytest.param(RAGGED, 4, None, id="ragged"),
        pytest.param(RAGGED, 2, None, id="ragged-two-groups"),
        pytest.param([0, 0, 7, 0], 4, None, id="one-rank-has-all-tokens"),
        pytest.param(RAGGED, 4, 10, id="one-expert-gets-all-tokens"),
        pytest.param([0, 0, 3, 1], 2, 0, id="a-group-without-tokens"),
    ],
)
def test_values_and_gradients_are_those_of_one_process(
    worker_pool: PoolFactory, kind: str, num_tokens: list[int], ep_size: int, all_on: int | None
) -> None:
    wanted = expected(*problem(sum(num_tokens), all_on))
    ranks = [each.found for each in worker_pool(4).run(exchange_on_rank, num_tokens, kind, ep_size, all_on)]
    assert_close(torch.cat([rank.x_grad for rank in ranks]), wanted.x_grad)
    for layer in range(len(OUTS)):
        assert_close(torch.cat([rank.y[layer] for rank in ranks]), wanted.y[layer])
        assert_close(torch.cat([rank.gate_grads[layer] for rank in ranks]), wanted.gate_grads[layer])
        for name in ("a_grads", "b_grads"):
            of_ranks = [getattr(rank, name)[layer] for rank in ranks]
            # each expert-parallel group has all experts, and gradients from its own ranks' tokens
            of_groups = [torch.cat(of_ranks[first : first + ep_size]) for first in range(0, 4, ep_size)]
            assert_close(torch.stack(of_groups).double().sum(0), getattr(wanted, name)[layer])


NUM_LOCAL = NUM_EXPERTS // 4  # on four ranks in one group


def wanted_by_layer(num_tokens: int, rank: int) -> Tensor:
    """(n, T, P) bool: which of a rank's tokens have an expert on which rank, for each layer."""
    _, layers = problem(4 * num_tokens)
    own = slice(rank * num_tokens, (rank + 1) * num_tokens)
    return torch.stack([layer.selected_TE[own].unflatten(1, (4, NUM_LOCAL)).any(-1) for layer in layers])


def rows_by_rank(messages: list[Message], width: int) -> Tensor:
    """(P,): rows of a width that were sent to each rank."""
    return torch.tensor([each.rows for each in messages if each.width == width and each.rows]).sum(0)


def test_a_token_travels_once_to_a_rank_for_all_layers_that_read_it(worker_pool: PoolFactory) -> None:
    """Neither once a layer nor once an expert; and its gradient comes back once."""
    num_tokens = 40
    ranks = worker_pool(4).run(exchange_on_rank, [num_tokens] * 4, "all_to_all", 4, None)
    sent_back = torch.stack([rows_by_rank(rank.backward, IN) for rank in ranks])
    for number, rank in enumerate(ranks):
        wanted = wanted_by_layer(num_tokens, number)
        sent = rows_by_rank(rank.forward, IN)
        assert sent.tolist() == wanted.any(0).sum(0).tolist()
        assert sent.sum() < 0.6 * wanted.sum(), "what three layers apart would send"
        assert sent_back[:, number].tolist() == sent.tolist()
        for layer, out in enumerate(OUTS):
            assert rows_by_rank(rank.backward, out).tolist() == wanted[layer].sum(0).tolist()
    for rank in worker_pool(4).run(exchange_on_rank, [num_tokens] * 4, "gather", 4, None):
        assert [each.rows for each in rank.forward if each.width == IN] == [[num_tokens] * 4]
        assert [each.rows for each in rank.backward if each.width == IN] == [[num_tokens] * 4]


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_as_many_bytes_travel_as_the_formulas_say(worker_pool: PoolFactory, kind: str) -> None:
    """Those in the docstring of `parallel.exchange`, with the probabilities counted over all choices of experts."""
    num_tokens, num_ranks, num_layers = 400, 4, len(OUTS)
    ranks = worker_pool(4).run(exchange_on_rank, [num_tokens] * num_ranks, kind, num_ranks, None)
    forward = [sum(each.num_bytes for each in rank.forward) for rank in ranks]
    backward = [sum(each.num_bytes for each in rank.backward) for rank in ranks]
    gates, outs = 4 * NUM_LOCAL * num_layers, 4 * sum(OUTS)
    if kind == "gather":
        assert forward == backward == [num_ranks * num_tokens * (4 * IN + gates + outs)] * num_ranks
        return
    choices = list(combinations(range(NUM_EXPERTS), TOP_K))
    q = sum(min(choice) < NUM_LOCAL for choice in choices) / len(choices)
    q_n = 1 - (1 - q) ** num_layers
    places, counts = num_tokens * q * 4 * (num_layers - 1), 4 * num_ranks * (2 * num_layers - 1)
    expected = num_ranks * (num_tokens * (q_n * 4 * IN + q * (gates + outs)) + places + counts)
    assert sum(forward) / num_ranks == pytest.approx(expected, rel=0.02)
    assert sum(backward) / num_ranks == pytest.approx(expected - num_ranks * (places + counts), rel=0.02)


def sums_on_rank() -> list[Tensor]:
    """What two tokens get back from all ranks in bf16, of which the second has been sent to all but the first."""
    from dsmoelora.config import AdapterConfig, ParallelConfig, Recipe
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.routes import GatherRoute, chosen_routes
    from dsmoelora.parallel.zero import make_placement

    adapter = AdapterConfig(num_experts=NUM_EXPERTS, top_k=TOP_K)
    placement = make_placement(Recipe(adapter=adapter, parallel=ParallelConfig(4, "all_to_all")))
    (chosen,) = chosen_routes([torch.tensor([[True, True, True, True], [False, True, True, True]])], placement)
    gather = GatherRoute([2] * 4, placement.ep_rank, placement.expert_group)
    mine = [1.0, 2.0**-8, 2.0**-8, 2.0**-9][comm.rank()]
    sums = []
    for route, num_rows in ((gather, 8), (chosen, 4 if comm.rank() == 0 else 8)):
        sums.append(route.sum_back(torch.full((num_rows, 3), mine, dtype=torch.bfloat16)).wait())
    return sums


def test_sums_are_rounded_once(worker_pool: PoolFactory) -> None:
    """Added up in bf16, 1 would stay 1."""
    for gathered, chosen in worker_pool(4).run(sums_on_rank):
        whole = torch.tensor(1 + 2.0**-7 + 2.0**-9).bfloat16()
        assert gathered.tolist() == [[whole.item()] * 3] * 2
        part = torch.tensor(2.0**-7 + 2.0**-9).bfloat16()
        assert chosen.tolist() == [[whole.item()] * 3, [part.item()] * 3]
