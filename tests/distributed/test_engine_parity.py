"""The engine under ZeRO-3 gives the losses and adapters of plain torch code, whatever ranks and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from dsmoelora import inject
from dsmoelora.config import Recipe
from dsmoelora.optim import build_optimizer, build_schedule
from tests.conftest import PoolFactory, thorough
from tests.engine_ranks import Job, assert_parity, build_engine, train_on_rank
from tests.plain_training import METHODS, Training, make_base, make_recipe, mean_loss, train_plainly


def weight_tolerance(method: str) -> float:
    """Adam turns rounding noise in tiny gradients into steps of the size of the learning rate."""
    return 1e-4 if METHODS[method]["optim"]["name"] == "adamw" else 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plainly(base: Path) -> Callable[[str], tuple[Recipe, Training]]:
    """`plainly(method)` is a method's recipe and what plain torch makes of it, trained once a session."""
    trained: dict[str, tuple[Recipe, Training]] = {}

    def get(method: str) -> tuple[Recipe, Training]:
        if method not in trained:
            recipe = make_recipe(base, **METHODS[method])
            trained[method] = (recipe, train_plainly(recipe))
        return trained[method]

    return get


Plainly = Callable[[str], tuple[Recipe, Training]]
# Every number of ranks and every accumulation occurs at each commit, all pairs over twenty steps before a release.
LAYOUTS = [
    *(("adamw-short", *layout) for layout in [(1, 4), (2, 2), (3, 1), (4, 1)]),
    *(thorough("adamw", *layout) for layout in product((1, 2, 3, 4), (1, 2, 4))),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_learns_and_clips_and_is_not_moved_by_rounding(plainly: Plainly, method: str) -> None:
    """What the comparisons below rest on."""
    recipe, expected = plainly(method)
    assert expected.smallest_gap > 1e-4
    assert expected.final_loss < 0.95 * expected.losses[0]
    max_norm = recipe.optim.max_grad_norm
    assert not max_norm or max(expected.grad_norms) > 1.2 * max_norm, "clipping must do something"
    in_fp64 = train_plainly(recipe, torch.float64)
    torch.testing.assert_close(in_fp64.losses, expected.losses, rtol=1e-6, atol=0)
    for name, value in in_fp64.weights.items():
        assert (value - expected.weights[name]).abs().max() < 0.3 * weight_tolerance(method) * value.abs().max(), name


@pytest.mark.parametrize(("method", "world_size", "accumulation"), LAYOUTS)
def test_ranks_and_accumulation_change_nothing(
    worker_pool: PoolFactory, plainly: Plainly, method: str, world_size: int, accumulation: int
) -> None:
    recipe, expected = plainly(method)
    shares = worker_pool(world_size).run(train_on_rank, Job(recipe, accumulation))
    assert_parity(shares, expected, weight_tolerance(method))


@pytest.mark.parametrize(
    ("method", "world_size", "accumulation"),
    [
        ("sgd", 1, 1),
        ("sgd", 3, 2),
        thorough("sgd", 4, 1),
        ("all-experts", 3, 1),
        thorough("all-experts", 4, 2),
        ("one-expert", 2, 2),
    ],
)
def test_other_methods_agree_too(
    worker_pool: PoolFactory, plainly: Plainly, method: str, world_size: int, accumulation: int
) -> None:
    recipe, expected = plainly(method)
    shares = worker_pool(world_size).run(train_on_rank, Job(recipe, accumulation))
    assert_parity(shares, expected, weight_tolerance(method))


def losses_of_own_loop(recipe: Recipe) -> list[float]:
    """Of the loop that docs/library.md shows."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    inject(model, recipe.adapter)
    optimizer = build_optimizer(model, recipe.optim)
    schedule = build_schedule(optimizer, recipe.optim, recipe.train.max_steps)
    losses = []
    for step in range(recipe.train.max_steps):
        loss = mean_loss(model.train(), step, recipe.run.seed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preconditioner", ["none", "scaled"])
def test_a_loop_of_ones_own_has_the_losses_of_the_engine(
    worker_pool: PoolFactory, plainly: Plainly, preconditioner: Any
) -> None:
    recipe, _ = plainly("adamw-short")
    recipe = replace(recipe, optim=replace(recipe.optim, preconditioner=preconditioner))
    shares = worker_pool(2).run(train_on_rank, Job(recipe, 2))
    assert shares[0].losses == pytest.approx(losses_of_own_loop(recipe), rel=1e-5)


HAS_STAGES_1_AND_2 = Version(deepspeed.__version__) >= Version("0.19.8")
needs_stages_1_and_2 = pytest.mark.skipif(not HAS_STAGES_1_AND_2, reason="DeepSpeed is older than 0.19.8")
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("world_size", "accumulation", "settings"),
    [
        pytest.param(3, 2, {"zero": OFFLOADED}, id="offloaded"),
        pytest.param(2, 1, {"zero": {"offload_optimizer": {"device": "cpu"}}}, id="optimizer-offloaded"),
        pytest.param(3, 2, {"partitioned": False}, id="model-not-partitioned"),
        pytest.param(2, 1, {"zero": {"stage3_param_persistence_threshold": 100_000}}, id="small-parameters-kept-whole"),
        pytest.param(2, 2, {"zero": {"overlap_comm": True, "contiguous_gradients": False}}, id="overlapped"),
        pytest.param(3, 1, {"zero": {"reduce_scatter": False}}, id="all-reduced"),
        pytest.param(3, 2, {"zero": {"stage": 2}, "partitioned": False}, id="stage-2", marks=needs_stages_1_and_2),
        pytest.param(2, 2, {"zero": {"stage": 2}}, id="stage-2-built", marks=needs_stages_1_and_2),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory, plainly: Plainly, world_size: int, accumulation: int, settings: dict[str, Any]
) -> None:
    recipe, expected = plainly("adamw-short")
    shares = worker_pool(world_size).run(train_on_rank, Job(recipe, accumulation, **settings))
    assert_parity(shares, expected, weight_tolerance("adamw"))


def start_with_unknown_deepspeed(job: Job, shift: int) -> str:
    """What the engine says under a version that nobody has read, whose partitions begin elsewhere by `shift`."""
    from dsmoelora.errors import ConfigError
    from dsmoelora.optim import rows
    from dsmoelora.parallel import zero

    def moved(of: Any, start: int, stop: int, offset: int) -> rows.Segment:
        return rows.Segment(of, start, stop, max(0, offset - shift))

    with mock.patch("deepspeed.__version__", "0.19.99"), mock.patch.object(zero, "Segment", moved):
        try:
            build_engine(job)
        except ConfigError as error:
            return str(error)
    return "started"


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=needs_stages_1_and_2)])
def test_an_unknown_deepspeed_must_show_where_numbers_lie(worker_pool: PoolFactory, base: Path, stage: int) -> None:
    job = Job(make_recipe(base, **METHODS["adamw-short"]), zero={"stage": stage})
    assert worker_pool(2).run(start_with_unknown_deepspeed, job, 0) == ["started"] * 2
    for answer in worker_pool(2).run(start_with_unknown_deepspeed, job, 1):
        assert "DeepSpeed 0.19.99" in answer and "numbers lie elsewhere" in answer and "pip install" in answer


@pytest.mark.parametrize("partitioned", [True, False])
def test_activation_checkpointing_changes_nothing(
    worker_pool: PoolFactory, plainly: Plainly, partitioned: bool
) -> None:
    recipe, expected = plainly("adamw-short")
    recipe = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    shares = worker_pool(2).run(train_on_rank, Job(recipe, 2, partitioned=partitioned))
    assert_parity(shares, expected, weight_tolerance("adamw"))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (3, 2)])
def test_bf16_stays_within_two_percent_of_fp32(
    worker_pool: PoolFactory, plainly: Plainly, world_size: int, accumulation: int
) -> None:
    recipe, expected = plainly("adamw-short")
    recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    for share in worker_pool(world_size).run(train_on_rank, Job(recipe, accumulation)):
        for loss, reference in zip(
            share.losses + [share.final_loss], expected.losses + [expected.final_loss], strict=True
        ):
            assert abs(loss - reference) <= 0.02 * reference
