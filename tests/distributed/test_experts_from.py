"""Experts that start from adapters, under ZeRO: the numbers of one device, whatever holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.adapters.given import settings_of
from dsmoelora.config import Recipe
from tests.conftest import PoolFactory, release
from tests.engine_ranks import Job, assert_parity, build_engine, train_on_rank
from tests.expert_parallel import partitioned
from tests.given_adapters import two_adapters
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 4
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Training]:
    """A recipe that goes on from PEFT's adapter and from one of ours with three experts, and what torch makes of it."""
    folder = tmp_path_factory.mktemp("given")
    base = make_base(folder / "base")
    paths = two_adapters(base, folder, TARGETS)
    adapter = settings_of(paths, {}) | {"experts_from": paths, "router": "softmax", "top_k": None}
    recipe = make_recipe(base, adapter=adapter, optim=SGD, max_steps=WHOLE, seed=3)
    return recipe, train_plainly(recipe)


def test_the_reference_starts_from_the_adapters_and_learns(reference: tuple[Recipe, Training]) -> None:
    """What the comparisons below rest on."""
    recipe, expected = reference
    afresh = train_plainly(replace(recipe, adapter=replace(recipe.adapter, experts_from=[])))
    assert abs(expected.losses[0] - afresh.losses[0]) > 1e-3
    assert expected.final_loss < 0.99 * expected.losses[0]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "settings"),
    [
        pytest.param(1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0"),
        pytest.param(2, 1, {"zero": {"stage": 2}}, id="stage-2", marks=release),
        pytest.param(2, 1, {"accumulation": 2}, id="stage-3"),
        pytest.param(2, 2, {}, id="ep-size-2"),
        pytest.param(4, 4, {"partitioned": False}, id="ep-size-4", marks=release),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory,
    reference: tuple[Recipe, Training],
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = reference
    shares = worker_pool(world_size).run(train_on_rank, Job(partitioned(recipe, ep_size), **settings))
    assert_parity(shares, expected, 1e-5)


def test_a_run_that_goes_on_reads_the_checkpoint_and_not_the_folders(
    worker_pool: PoolFactory, reference: tuple[Recipe, Training], tmp_path: Path
) -> None:
    recipe, expected = reference
    worker_pool(2).run(train_on_rank, Job(recipe, last_step=HALF, save_to=tmp_path))
    job = Job(partitioned(recipe, 2), first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    for share in worker_pool(2).run(train_on_rank_with_other_numbers, job):
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)


def train_on_rank_with_other_numbers(job: Job) -> Any:
    """The folders' headers are looked at again, their numbers are not."""
    from unittest import mock

    from dsmoelora import engine

    with mock.patch.object(engine, "take_experts", side_effect=AssertionError("read")):
        return train_on_rank(job)


def error_of_rank(job: Job) -> str:
    from dsmoelora.errors import UserError
    from dsmoelora.parallel import comm

    if comm.rank() == 1:  # as on a node that does not see the disk
        paths = [f"{path}-of-another-node" for path in job.recipe.adapter.experts_from]
        job = replace(job, recipe=replace(job.recipe, adapter=replace(job.recipe.adapter, experts_from=paths)))
    try:
        build_engine(job)
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_one_rank_cannot_read_is_everybodys_error(
    worker_pool: PoolFactory, reference: tuple[Recipe, Training]
) -> None:
    for said in worker_pool(2).run(error_of_rank, Job(reference[0])):
        assert "of-another-node is no adapter folder" in said
