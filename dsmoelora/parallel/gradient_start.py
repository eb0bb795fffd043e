"""The start of a run with `adapter.init: gradient`, on ZeRO's shards (see `adapters.starts.gradient`).

ZeRO brings the gradients of `a` as it brings those of any step: reduced, and each number to the rank that holds it. An
expert's rows and those of its neighbours lie on different ranks then, but are orthogonalised against each other. So
sketches are put together, layers side by side in one all-reduce; each rank finds the start and keeps its own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.adapters import Factor
from dsmoelora.adapters.starts.gradient import missing_below, start_of_a
from dsmoelora.config import Recipe
from dsmoelora.errors import HopelessError
from dsmoelora.optim import ShardOptimizer
from dsmoelora.optim.rows import Segment, Shard, Trainable
from dsmoelora.parallel import comm, zero

# Numbers of an all-reduce, 256 MiB: three times all of a 7B model with 20 experts of rank 4 on q and v.
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class StartReport:
    """What the experts have started from.

    Args:
        num_directions: columns of all `a`
        num_drawn: those of them that the gradient did not have
    """

    num_directions: int
    num_drawn: int


def start_from_gradients(
    engine: deepspeed.DeepSpeedEngine,
    optimizer: ShardOptimizer,
    passes: Sequence[Callable[[], object]],
    recipe: Recipe,
) -> StartReport:
    """Let every `a` start from the gradient of these passes, and `b` at 0 (collective).

    Args:
        engine: with `a` at 0 and `b` drawn
        optimizer: of the engine, bound, no step taken
        passes: forward and backward over this rank's micro-batches, as many on every rank
        recipe: of the run

    Raises:
        HopelessError: the gradient is not finite, with fp16 at no loss scale that is tried
    """
    attempts = recipe.train.max_skipped_steps if recipe.model.dtype == "fp16" else 1
    if not any(_take_sketches(engine, optimizer, passes) for _ in range(attempts)):
        raise HopelessError(
            f"The gradient of the first {recipe.adapter.init_samples} rows, from which experts start with adapter.init "
            "= gradient, is not finite. Set model.dtype to bf16 or fp32, or adapter.init to kaiming."
        )
    report = _orthogonalise(optimizer, recipe)
    zero.push_master_weights(engine)
    return report


def _take_sketches(
    engine: deepspeed.DeepSpeedEngine, optimizer: ShardOptimizer, passes: Sequence[Callable[[], object]]
) -> bool:
    """Put the gradient of every `a` in the place of its masters; whether it is finite."""
    optimizer.keeps_sketches = True
    try:
        with zero.own_accumulation(engine) as set_last:
            for number, run in enumerate(passes, start=1):
                set_last(number == len(passes))
                run()
            norm = zero.unchecked_grad_norm(engine)
            optimizer.skip = norm is not None and not math.isfinite(norm)
            zero.step(engine)
            return not optimizer.skip and zero.step_was_applied(engine)
    finally:
        optimizer.keeps_sketches = optimizer.skip = False


@torch.no_grad()
def _orthogonalise(optimizer: ShardOptimizer, recipe: Recipe) -> StartReport:
    """Turn the sketches that the masters hold into the start, and set `b` to 0."""
    factors = [of for of in optimizer.trainables if of.factor is Factor.A]
    limit, num_drawn = missing_below(recipe.model.torch_dtype), 0
    for some in _at_once(factors):
        found = _whole(some, optimizer.shards)
        for name, of in some.items():
            start_EDR, drawn = start_of_a(found[name].view(of.shape), recipe.adapter, of.layer, limit)
            found[name] = start_EDR.view(-1)
            num_drawn += int(drawn)
        for segment, values in _held(optimizer.shards):
            if segment.of.name in found:
                values.copy_(found[segment.of.name][segment.start : segment.stop])
    for segment, values in _held(optimizer.shards):
        if segment.of.factor is Factor.B:
            values.zero_()
    return StartReport(sum(of.shape[0] * of.row_size for of in factors), num_drawn)


def _at_once(factors: Sequence[Trainable]) -> Iterator[dict[str, Trainable]]:
    """As many tensors at a time as one all-reduce takes, by name."""
    some: dict[str, Trainable] = {}
    for of in factors:
        if some and sum(math.prod(one.shape) for one in (*some.values(), of)) > _AT_ONCE:
            yield some
            some = {}
        some[of.name] = of
    yield some


def _whole(wanted: dict[str, Trainable], shards: Sequence[Shard]) -> dict[str, torch.Tensor]:
    """Tensors over all experts, flat and on the accelerator, on every rank: one all-reduce."""
    sizes = [math.prod(of.shape) for of in wanted.values()]
    flat = torch.zeros(sum(sizes), device=get_accelerator().current_device_name())
    found = dict(zip(wanted, flat.split(sizes), strict=True))
    for segment, values in _held(shards):
        if segment.of.name in found:
            found[segment.of.name][segment.start : segment.stop] = values
    if all(shard.num_copies == 1 for shard in shards):
        comm.sum_over_ranks(flat)
    return found


def _held(shards: Sequence[Shard]) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Every segment of rows that this rank holds, and its masters."""
    for shard in shards:
        flat = shard.tensor.detach().view(-1)
        yield from ((segment, flat[segment.span]) for segment in shard.segments)
