"""Experts that start from singular vectors, under ZeRO: the numbers of one device, and a start that is kept."""

from __future__ import annotations

from typing import Any

import pytest

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, assert_parity, train_on_rank
from tests.expert_parallel import partitioned
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Training]:
    """A recipe, and what plain torch makes of it; no token comes near the border between two experts."""
    adapter = {"init": "svd", "num_experts": 4, "top_k": 2}
    recipe = make_recipe(
        make_base(tmp_path_factory.mktemp("base")), adapter=adapter, optim=SGD, max_steps=WHOLE, seed=50
    )
    return recipe, train_plainly(recipe)


def test_the_reference_learns_and_is_not_moved_by_rounding(reference: tuple[Recipe, Training]) -> None:
    """What the comparisons below rest on."""
    _, expected = reference
    assert expected.smallest_gap > 1e-4
    assert expected.final_loss < 0.95 * expected.losses[0]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "settings"),
    [
        pytest.param(1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0"),
        pytest.param(2, 1, {"zero": {"stage": 1}, "partitioned": False}, id="stage-1"),
        pytest.param(2, 1, {"zero": {"stage": 2}}, id="stage-2"),
        pytest.param(2, 1, {"accumulation": 2}, id="stage-3"),
        pytest.param(2, 1, {"partitioned": False}, id="stage-3-not-partitioned"),
        pytest.param(2, 1, {"zero": {"stage3_param_persistence_threshold": 100_000}}, id="small-parameters-kept-whole"),
        pytest.param(
            2, 1, {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}, id="offloaded"
        ),
        pytest.param(2, 2, {}, id="ep-size-2"),
        pytest.param(2, 2, {"partitioned": False, "accumulation": 2}, id="ep-size-2-not-partitioned"),
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
