"""Saving and loading on threads in the place of ranks, for the tests of checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.checkpoint import training_state
from dsmoelora.checkpoint.training_state import (
    ShardState,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from tests.shardings import Numbers, Segments, blank_shards, per_parameter, random_numbers, shards_of, some_parameters
from tests.threaded_ranks import ThreadedComm

ADAM = ["value", "exp_avg", "exp_avg_sq"]
PARAMETERS = some_parameters(random.Random(0), num_experts=4)
FILLING = -7.0


def on_ranks(world_size: int, fn: Callable[[int], Any]) -> list[Any]:
    """Run collective code on threads in the place of ranks; an exception is an outcome too."""
    comm = ThreadedComm(world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "comm", comm)
        return comm.run(fn)


def save(
    root: Path, step: int, layout: list[Segments], numbers: Numbers, keep: int = 2, state: Any = None
) -> list[Any]:
    """Save on as many ranks as the layout has; the padding is not a number, and nobody minds."""
    shards = [shards_of(segments, numbers, padding=math.nan) for segments in layout]
    return on_ranks(len(layout), lambda rank: save_checkpoint(root, step, shards[rank], state or {}, keep))


def load(folder: Path, layout: list[Segments], names: list[str]) -> tuple[list[Any], list[list[ShardState]]]:
    """Load on as many ranks as the layout has: outcomes and shards by rank."""
    shards = [blank_shards(segments, names, FILLING) for segments in layout]
    return on_ranks(len(layout), lambda rank: load_checkpoint(folder, shards[rank])), shards


def newest(root: Path, world_size: int = 2) -> Path | None:
    outcomes = on_ranks(world_size, lambda rank: newest_whole_checkpoint(root))
    assert len(set(outcomes)) == 1, "ranks disagree"
    return outcomes[0]


def saved_run(root: Path, steps: tuple[int, ...] = (50, 100)) -> dict[int, Numbers]:
    """Two ranks have saved at the given steps; the numbers of each step."""
    numbers = {step: random_numbers(PARAMETERS, ADAM, seed=step) for step in steps}
    for step in steps:
        outcomes = save(root, step, per_parameter(PARAMETERS, 2), numbers[step], keep=len(steps), state={"step": step})
        assert outcomes == [root / f"checkpoint-{step}"] * 2
    return numbers


def assert_equal_to_the_bit(shards: list[list[ShardState]], layout: list[Segments], numbers: Numbers) -> None:
    """Segments hold the numbers, everything else holds what it held before the load."""
    for loaded, segments in zip(shards, layout, strict=True):
        for shard, expected in zip(loaded, shards_of(segments, numbers, padding=FILLING), strict=True):
            for name, tensor in shard.tensors.items():
                assert torch.equal(tensor.view(torch.int32), expected.tensors[name].view(torch.int32))


def names_below(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_untouched(root: Path, numbers: dict[int, Numbers]) -> None:
    assert names_below(root) == sorted(f"checkpoint-{step}" for step in numbers)
    layout = per_parameter(PARAMETERS, 1)
    for step in numbers:
        outcomes, shards = load(root / f"checkpoint-{step}", layout, ADAM)
        assert outcomes == [{"step": step}]
        assert_equal_to_the_bit(shards, layout, numbers[step])
