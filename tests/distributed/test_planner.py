"""The planner's memory beside what two ranks really hold while they train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, ParallelConfig, Recipe, TrainConfig
from dsmoelora.planner import Phase, memory_of, plan_memory, rehearse
from dsmoelora.planner.traffic import _checkpoint as checkpoint_of
from tests.conftest import PoolFactory, thorough
from tests.helpers import tiny_llama
from tests.memory_of_rank import train_and_measure

ROUTERS_SUMS = 30_000  # bytes, and what else the planner says that it leaves out
# as in a model that is too large for its weights to stay from one pass to the next
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 20_000,
    "stage3_prefetch_bucket_size": 8_000,
    "stage3_max_live_parameters": 60_000,
}


OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


def recipe_of(folder: Path, dtype: Any, length: int, checkpointing: bool = False) -> Recipe:
    base = tiny_llama(folder, num_hidden_layers=4)
    return Recipe(
        model=ModelConfig(path=str(base), dtype=dtype),
        adapter=AdapterConfig(num_experts=4, top_k=2, target_modules="all-linear"),
        optim=OptimConfig(preconditioner="tangent"),
        data=DataConfig(max_length=length),
        train=TrainConfig(activation_checkpointing=checkpointing, micro_batch_size=2, batch_size=4, loss_chunk=32),
    )


def zero_of(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "reduce_bucket_size": 10_000} | (LARGE if stage == 3 else {}) | more


def assert_holds_what_is_planned(recipe: Recipe, stage: int, pool: PoolFactory) -> None:
    zero = zero_of(stage)
    plan = plan_memory(recipe, {"zero_optimization": zero}, 2)
    found = pool(2).run(train_and_measure, recipe, zero)[0]
    always = plan.total(Phase.ALWAYS)
    assert always == pytest.approx(found.at_rest, abs=ROUTERS_SUMS)
    assert plan.total(Phase.PASS) - always == pytest.approx(found.peak, rel=0.1)
    if stage == 3:
        gathered = rehearse(recipe, {"zero_optimization": zero}, 2).gathered
        assert gathered.peak == pytest.approx(found.gathered_peak, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [3, 0, thorough(1), thorough(2)])
def test_memory_of_a_rank(stage: int, checkpointing: bool, tmp_path: Path, worker_pool: PoolFactory) -> None:
    assert_holds_what_is_planned(recipe_of(tmp_path, "fp32", 128, checkpointing), stage, worker_pool)


@pytest.mark.parametrize("stage", [3, thorough(0)])
def test_memory_of_a_rank_with_lengths_of_rows(stage: int, tmp_path: Path, worker_pool: PoolFactory) -> None:
    """Those of the base are buffers, the base's output is kept, and its layers are called twice."""
    recipe = recipe_of(tmp_path, "fp32", 128)
    recipe = replace(recipe, adapter=replace(recipe.adapter, expert="dora"))
    assert_holds_what_is_planned(recipe, stage, worker_pool)


@pytest.mark.parametrize("stage", [3, thorough(0)])
def test_memory_of_a_rank_with_a_base_in_4_bits(stage: int, tmp_path: Path, worker_pool: PoolFactory) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")
    recipe = recipe_of(tmp_path, "fp32", 128)
    recipe = replace(recipe, model=replace(recipe.model, quantize="nf4"))
    plan = plan_memory(recipe, {"zero_optimization": zero_of(stage)}, 2)
    found = worker_pool(2).run(train_and_measure, recipe, zero_of(stage))[0]
    always = plan.total(Phase.ALWAYS)
    assert always == pytest.approx(found.at_rest, abs=ROUTERS_SUMS)
    assert plan.total(Phase.PASS) - always == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize(
    ("exchange", "checkpointing"), [("gather", False), thorough("gather", True), thorough("all_to_all", False)]
)
def test_memory_of_a_rank_with_some_of_the_experts(
    exchange: Any, checkpointing: bool, tmp_path: Path, worker_pool: PoolFactory
) -> None:
    recipe = recipe_of(tmp_path, "fp32", 128, checkpointing)
    recipe = replace(recipe, parallel=ParallelConfig(ep_size=2, exchange=exchange))
    plan = plan_memory(recipe, {"zero_optimization": zero_of(3)}, 2)
    found = worker_pool(2).run(train_and_measure, recipe, zero_of(3))[0]
    always = plan.total(Phase.ALWAYS)
    assert always == pytest.approx(found.at_rest, abs=ROUTERS_SUMS)
    assert plan.total(Phase.PASS) - always == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "more"),
    [(3, OFFLOADED), (1, {}), thorough(2, {}), thorough(2, {"offload_optimizer": {"device": "cpu"}}), thorough(3, {})],
)
def test_what_is_held_between_two_steps_in_bf16(
    stage: int, more: dict[str, Any], tmp_path: Path, worker_pool: PoolFactory
) -> None:
    """Device and host together, for here they are one."""
    recipe, zero = recipe_of(tmp_path, "bf16", 16), zero_of(stage, **more)
    plan = plan_memory(recipe, {"zero_optimization": zero}, 2)
    found = worker_pool(2).run(train_and_measure, recipe, zero)[0]
    always = sum(plan.total(Phase.ALWAYS, on_host=on_host) for on_host in (False, True))
    assert always == pytest.approx(found.at_rest, abs=ROUTERS_SUMS)


@dataclass(frozen=True)
class Start:
    """Bytes of a rank.

    Args:
        held: of the factors' start, on the device or the host
        written: of the numbers in its file of a checkpoint
    """

    held: int
    written: int


def keep_and_write_start(recipe: Recipe, zero: dict[str, Any], folder: Path) -> Start:
    from dsmoelora.engine import Engine
    from dsmoelora.parallel import comm

    engine = Engine.build(recipe, {"zero_optimization": zero})
    assert engine._start is not None
    checkpoint = engine.save(folder, {}, keep=1)
    numbers = load_file(checkpoint / f"rank-{comm.rank():05}.safetensors").values()
    return Start(sum(flat.nbytes for flat in engine._start.flat), sum(tensor.nbytes for tensor in numbers))


@pytest.mark.parametrize(
    ("world_size", "stage", "dtype", "more"),
    [
        (1, 3, "bf16", {}),
        (2, 3, "bf16", {"offload_optimizer": {"device": "cpu"}}),
        (2, 2, "fp32", {}),
        thorough(1, 0, "fp32", {}),
        thorough(2, 1, "bf16", {}),
    ],
)
def test_the_start_that_is_kept_and_written(
    world_size: int, stage: int, dtype: Any, more: dict[str, Any], tmp_path: Path, worker_pool: PoolFactory
) -> None:
    recipe, zero = recipe_of(tmp_path, dtype, 16), zero_of(stage, **more)
    recipe = replace(recipe, adapter=replace(recipe.adapter, init="svd"))
    run = rehearse(recipe, {"zero_optimization": zero}, world_size)
    (part,) = [one for one in memory_of(run).parts if one.name == "start of the factors"]
    assert (part.is_exact, part.phase, part.on_host) == (True, Phase.ALWAYS, bool(more))
    found = worker_pool(world_size).run(keep_and_write_start, recipe, zero, tmp_path / "run")[0]
    assert part.num_bytes == found.held
    assert checkpoint_of(run).sent_bytes == found.written
