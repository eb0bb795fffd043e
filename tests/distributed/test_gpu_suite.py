"""What the tests on a GPU call, on a CPU: the same functions, so that they are known to work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.distributed.test_matrix import recipe_of
from tests.engine_ranks import train_on_rank
from tests.gpu_engine import answers, assert_healthy, first_half, join_over_gloo, learn, save_half_way
from tests.helpers_distributed import WorkerPool
from tests.plain_training import METHODS, make_base, make_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def recipe(base: Path) -> Recipe:
    return make_recipe(base, **METHODS["adamw-short"])


@pytest.mark.parametrize(("expert", "rule"), [("lora", "none"), ("dora", "scaled")])
def test_learning_is_healthy(worker_pool: PoolFactory, base: Path, expert: str, rule: str) -> None:
    settings = {"router": "softmax_topk", "init": "kaiming", "style": "per_linear"}
    assert_healthy(
        worker_pool(1).run(learn, [recipe_of(base, expert=expert, preconditioner=rule, **settings)])[0], "cpu"
    )


def test_answers_come_and_a_checkpoint_goes_on(worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path) -> None:
    assert len(worker_pool(1).run(answers, recipe)[0]) == 2
    (before,) = worker_pool(1).run(train_on_rank, first_half(recipe, tmp_path))
    (after,) = worker_pool(1).run(train_on_rank, save_half_way(recipe, tmp_path))
    assert before.losses and after.losses


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, join_group=False)
    yield pool
    pool.close()


def test_ranks_that_share_a_device_meet_over_gloo(own_pool: WorkerPool) -> None:
    assert len(own_pool.run(join_over_gloo)) == 2
