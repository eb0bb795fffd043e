"""The planner's collectives beside those that two and four ranks really take part in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from dsmoelora.config import ParallelConfig, Recipe
from dsmoelora.planner import Rehearsal, Traffic, plan_traffic, rehearse, traffic_of
from dsmoelora.planner.traffic import sent_bytes
from tests import lone_rank
from tests.conftest import PoolFactory, thorough
from tests.distributed.test_planner import recipe_of, zero_of
from tests.helpers import tiny_llama
from tests.traffic_of_rank import Key, train_and_record

WHOLE = {"stage3_param_persistence_threshold": 10**9}


def totals(traffic: list[Traffic]) -> tuple[Counter[Key], Counter[Key]]:
    """Messages and bytes of a step, by phase, collective and size of the process group."""
    messages: Counter[Key] = Counter()
    num_bytes: Counter[Key] = Counter()
    for one in traffic:
        if one.op != "write":
            key = (one.phase, one.op, one.group_size)
            messages[key] += one.messages
            num_bytes[key] += one.sent_bytes
    return messages, num_bytes


def with_ranks(recipe: Recipe, num_ranks: int, **parallel: Any) -> Recipe:
    """Two micro-batches of a rank in a step."""
    train = replace(recipe.train, batch_size=2 * num_ranks * recipe.train.micro_batch_size)
    return replace(recipe, train=train, parallel=ParallelConfig(**parallel))


def compare(recipe: Recipe, zero: dict[str, Any], pool: Any, num_ranks: int, rel: float = 0.02) -> None:
    found = pool.run(train_and_record, recipe, zero)[0]
    messages, num_bytes = totals(plan_traffic(recipe, {"zero_optimization": zero}, num_ranks))
    assert messages == found.messages
    for key, whole in found.num_bytes.items():
        assert num_bytes[key] == pytest.approx(sent_bytes(key[1], whole, key[2]), rel=rel), key


@pytest.mark.parametrize(
    ("stage", "more", "dtype", "checkpointing"),
    [
        (3, {}, "fp32", True),
        (3, {}, "fp32", False),
        (3, WHOLE, "fp32", False),
        (3, WHOLE | {"stage3_prefetch_bucket_size": 1_000}, "bf16", False),
        thorough(3, {"reduce_scatter": False}, "fp32", False),
        (2, {}, "bf16", False),
        thorough(2, {}, "fp32", False),
        (1, {}, "fp32", False),
        thorough(1, {}, "bf16", False),
        (0, {}, "fp32", False),
    ],
)
def test_collectives_of_a_step(
    stage: int,
    more: dict[str, Any],
    dtype: Literal["fp32", "bf16"],
    checkpointing: bool,
    tmp_path: Path,
    worker_pool: PoolFactory,
) -> None:
    recipe = with_ranks(recipe_of(tmp_path, dtype, 16, checkpointing), 2)
    compare(recipe, zero_of(stage, **more), worker_pool(2), 2)


@pytest.mark.parametrize(
    ("more", "exchange", "rel"),
    # experts are not chosen at random, as the formulas of `all_to_all` have it
    [({}, "gather", 0.02), (WHOLE, "gather", 0.02), ({}, "all_to_all", 0.1)],
)
def test_collectives_of_experts_on_several_ranks(
    more: dict[str, Any],
    exchange: Literal["gather", "all_to_all"],
    rel: float,
    tmp_path: Path,
    worker_pool: PoolFactory,
) -> None:
    recipe = with_ranks(recipe_of(tmp_path, "fp32", 64), 4, ep_size=2, exchange=exchange)
    compare(recipe, zero_of(3, **more), worker_pool(4), 4, rel)


@pytest.mark.parametrize(
    ("world_size", "rank", "stage", "ep_size"),
    [
        (1024, 1023, 3, 4),
        thorough(1024, 0, 3, 4),
        thorough(1024, 510, 3, 1),
        thorough(256, 130, 3, 4),
        thorough(256, 255, 2, 1),
        thorough(64, 0, 3, 1),
        thorough(64, 63, 3, 4),
    ],
)
def test_a_step_of_many_ranks(world_size: int, rank: int, stage: int, ep_size: int, tmp_path: Path) -> None:
    """The real engine takes four steps as one of them, the other ranks saying what it says."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    base = tiny_llama(tmp_path, **sizes)
    words = [sys.executable, "-m", "tests.lone_rank", *map(str, (world_size, rank, stage, ep_size, base))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    recipe = lone_rank.recipe_of(str(base), world_size, ep_size)
    run = rehearse(recipe, {"zero_optimization": {"stage": stage, **lone_rank.ZERO}}, world_size)
    messages, num_bytes = totals(traffic_of(run))
    assert messages == {(phase, op, ranks): count for phase, op, ranks, count, _ in found["rows"]}
    for phase, op, ranks, _, whole in found["rows"]:
        assert num_bytes[phase, op, ranks] == pytest.approx(sent_bytes(op, whole, ranks), rel=1e-3, abs=2)
    if stage == 3:
        assert sorted(one[1:] for one in found["held"]) == sorted(pieces_of(run, rank))
    else:
        assert sum(stop - start for _, _, start, stop in found["held"]) <= run.own_numel


def pieces_of(run: Rehearsal, rank: int) -> list[list[Any]]:
    """What a rank holds under ZeRO-3: with `ep_size` P its experts are the (rank mod P)-th of P equal parts."""
    ep_size, found = run.recipe.parallel.ep_size, []
    for one in run.shapes.trained:
        assert one.trainable is not None
        is_shared_out = one.num_pieces < run.world_size
        place, part = (rank // ep_size, rank % ep_size) if is_shared_out else (rank, 0)
        start, stop = one.piece * place, min(one.piece * (place + 1), one.numel)
        if start < stop:
            found.append([one.trainable.name, part * one.numel + start, part * one.numel + stop])
    return found
