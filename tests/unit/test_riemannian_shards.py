"""The sharded step against the single-device reference, for every way of cutting parameters that ZeRO may think of."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoelora.adapters import Factor
from dsmoelora.optim import OptimConfig, Segment, Shard, ShardGroup, ShardOptimizer
from dsmoelora.optim.algebra import add_gram, rmul_
from dsmoelora.optim.reference import precondition
from dsmoelora.optim.rows import rows_cut_by
from dsmoelora.optim.tiles import Tile
from tests.riemannian_formula import relative_error
from tests.riemannian_problems import Problem, random_problem
from tests.shardings import Segments, one_buffer, per_parameter

Rule = Literal["scaled", "tangent"]
PADDING = 7.0


def test_an_accelerator_makes_no_temporary_above_16_mib() -> None:
    """The factors on q and v of a 7B model, 20 experts of rank 4; the meta device stands for an accelerator."""
    num_layers, num_experts, num_rows, rank = 128, 20, 4096, 4
    slots = torch.arange(num_layers * num_experts, device="meta")
    distance = num_experts * num_rows * rank
    tile = Tile(Factor.A, 0, distance, num_experts, num_rows, rank, slots)
    flat = torch.empty(num_layers * distance, device="meta")
    matrices = torch.empty(len(slots), rank, rank, device="meta")
    with Products() as products:
        add_gram(matrices, tile, flat, flat)
        rmul_(flat, tile, matrices, flat, matrices)
    assert 0 < products.largest <= 16 * 2**20 // 4
    assert products.count <= 3 * 11, "and few kernels: a gram, a product and a subtraction for each of 11 chunks"


class Products(TorchDispatchMode):
    """How many products ran, and the numbers of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "bmm" in func.overloadpacket.__name__:
            self.count += 1
            self.largest = max(self.largest, result.numel())
        return result


def random_cuts(problem: Problem, world_size: int, rng: random.Random) -> list[Segments]:
    """Every parameter cut anywhere, its pieces on random ranks; two shards a rank, with holes between the segments."""
    ranks: list[Segments] = [[[], []] for _ in range(world_size)]
    for each in problem.trainables:
        size = math.prod(each.shape)
        cuts = sorted({0, size, *rng.sample(range(1, size), min(size - 1, rng.randint(0, 9)))})
        for start, stop in pairwise(cuts):
            segments = ranks[rng.randrange(world_size)][rng.randrange(2)]
            segments.append(
                Segment(each, start, stop, (segments[-1].span.stop if segments else 0) + rng.choice([0, 0, 5]))
            )
    return ranks


def shards_of(problem: Problem, runs_of_rank: Segments) -> list[Shard]:
    """The shards of a rank with values and gradients; padding has values and no gradient, as under ZeRO."""
    shards = []
    for segments in runs_of_rank:
        size = max((segment.span.stop for segment in segments), default=0) + 3
        tensor, grad = torch.full((size,), PADDING), torch.zeros(size)
        for segment in segments:
            tensor[segment.span] = problem.values[segment.of.name].flatten()[segment.start : segment.stop]
            grad[segment.span] = problem.grads[segment.of.name].flatten()[segment.start : segment.stop]
        tensor.grad = grad
        shards.append(Shard(tensor, segments))
    return shards


class Ranks:
    """Threads that sum tensors over one another."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._tensors: list[Tensor] = []
        self._sum = torch.empty(0)

    def all_reduce(self, flat: Tensor) -> None:
        self._tensors.append(flat)
        if self._barrier.wait() == 0:
            self._sum = torch.stack(self._tensors).sum(0)
            self._tensors = []
        self._barrier.wait()
        flat.copy_(self._sum)

    def segment(self, steps: list[Callable[[], None]]) -> None:
        """Each in a thread of its own."""
        threads = [threading.Thread(target=step) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self._barrier.broken, "a rank has failed"


def sharded_optimizers(
    problem: Problem, config: OptimConfig, placement: list[Segments]
) -> tuple[Ranks, list[ShardOptimizer]]:
    """An optimizer for each rank, bound as `parallel.shards.shard_groups` would do it."""
    factors = {each.name: each for each in problem.trainables if each.factor in (Factor.A, Factor.B)}
    every_run = [segment for runs_of_rank in placement for segments in runs_of_rank for segment in segments]
    cut_rows = [(factors[name], row) for name, row in rows_cut_by(every_run) if name in factors]
    ranks, optimizers = Ranks(len(placement)), []
    for runs_of_rank in placement:
        optimizer = ShardOptimizer([(each, torch.nn.Parameter(torch.zeros(1))) for each in problem.trainables], config)
        shards = shards_of(problem, runs_of_rank)
        optimizer.param_groups[0]["params"] = [shard.tensor for shard in shards]  # as ZeRO does
        optimizer.bind([ShardGroup(problem.trainables, shards, cut_rows, ranks.all_reduce)])
        optimizers.append(optimizer)
    return ranks, optimizers


def reference_values(problem: Problem, config: OptimConfig) -> dict[str, Tensor]:
    """After one step of SGD with the reference's gradients, in fp64."""
    grads = {name: grad.double() for name, grad in problem.grads.items()}
    values = {name: value.double() for name, value in problem.values.items()}
    for parts in problem.layers():
        a, b = parts[Factor.A].name, parts[Factor.B].name
        m = parts[Factor.M].name if Factor.M in parts else ""
        new = precondition(config, values[a], values[b], grads[a], grads[b], values.get(m), grads.get(m))
        grads |= {name: grad for name, grad in zip((a, b, m), new, strict=True) if grad is not None}
    return {name: value - config.lr * grads[name] for name, value in values.items()}


def assert_a_step_equals_the_reference(problem: Problem, rule: Rule, placement: list[Segments]) -> None:
    """How far every tensor comes is right within 1e-5, on whatever ranks its pieces are; padding stays."""
    config = OptimConfig(name="sgd", lr=10.0, lr_router=None, preconditioner=rule, damping=0.1)  # a visible change
    ranks, optimizers = sharded_optimizers(problem, config, placement)
    ranks.segment([optimizer.step for optimizer in optimizers])
    found = {name: torch.full((value.numel(),), torch.nan) for name, value in problem.values.items()}
    for optimizer in optimizers:
        for shard in optimizer.shards:
            unused = torch.ones(len(shard.tensor), dtype=torch.bool)
            for segment in shard.segments:
                found[segment.of.name][segment.start : segment.stop] = shard.tensor[segment.span]
                unused[segment.span] = False
            assert (shard.tensor[unused] == PADDING).all()
    for name, expected in reference_values(problem, config).items():
        start = problem.values[name]
        assert relative_error(found[name].view_as(start) - start, expected - start) <= 1e-5, name


@pytest.mark.parametrize("mixers", [False, True], ids=["", "mixers"])
@pytest.mark.parametrize("rule", ["scaled", "tangent"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cut", [per_parameter, one_buffer])
def test_rows_cut_by_shards_are_exact(cut: Any, world_size: int, rule: Rule, mixers: bool) -> None:
    """D = 100, O = 52, R = 3: boundaries of 3 ranks lie inside rows; of unequal layers nothing repeats regularly."""
    problem = random_problem([(100, 52), (52, 100), (100, 52), (100, 52)], num_experts=4, rank=3, mixers=mixers)
    assert_a_step_equals_the_reference(problem, rule, cut(problem.trainables, world_size))


@pytest.mark.parametrize("rule", ["scaled", "tangent"])
def test_more_ranks_than_rows(rule: Rule) -> None:
    """Rows of 7 numbers in pieces of 2 or 3, and ranks at the end that hold nothing but padding."""
    problem = random_problem([(9, 2), (8, 9)], num_experts=2, rank=7)
    placement = per_parameter(problem.trainables, world_size=53)
    pieces_of_rows = Counter(
        (segment.of.name, row)
        for runs_of_rank in placement
        for segment in runs_of_rank[0]
        for row in range(segment.start // 7, (segment.stop - 1) // 7 + 1)
        if segment.of.factor is not Factor.ROUTER
    )
    assert max(pieces_of_rows.values()) >= 4
    assert not any(
        segment.of.name.endswith("b") and segment.of.layer == "layers.0.proj" for segment in placement[-1][0]
    )
    assert_a_step_equals_the_reference(problem, rule, placement)
    empty = one_buffer(problem.trainables, world_size=200)
    assert not empty[-1][0]
    assert_a_step_equals_the_reference(problem, rule, empty)


@pytest.mark.parametrize("seed", range(20))
def test_random_cuts(seed: int) -> None:
    rng = random.Random(seed)
    rank, num_experts = rng.randint(1, 5), rng.randint(1, 4)
    sizes = [(rng.randint(6, 40), rng.randint(6, 40)) for _ in range(rng.randint(1, 3))]
    problem = random_problem(sizes, num_experts=num_experts, rank=rank, mixers=rng.random() < 0.3, seed=seed)
    rule: Rule = rng.choice(["scaled", "tangent"])
    assert_a_step_equals_the_reference(problem, rule, random_cuts(problem, rng.randint(1, 6), rng))
