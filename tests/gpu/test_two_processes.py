"""Two ranks on one GPU. NCCL refuses to join ranks that share a device, so gloo carries the CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsmoelora.config import Recipe
from tests.distributed.test_exchange import exchange_on_rank
from tests.distributed.test_stopping import polls_until_stopped
from tests.engine_ranks import Job, train_on_rank
from tests.expert_parallel import partitioned
from tests.gpu_engine import first_half, join_over_gloo, save_half_way
from tests.helpers_distributed import WorkerPool
from tests.plain_training import METHODS, make_base, make_recipe


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    two = WorkerPool(2, env={"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}, join_group=False, forked=False)
    assert two.run(join_over_gloo) == ["cuda:0"] * 2, "each believes that its device is number 0"
    yield two
    two.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(make_base(tmp_path_factory.mktemp("base")), **METHODS["adamw-short"])


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_tokens_travel_on_the_device(pool: WorkerPool, kind: str) -> None:
    ranks = pool.run(exchange_on_rank, [5, 3], kind, 2, None)
    assert len(ranks) == 2


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_poll(pool: WorkerPool, signalled: int) -> None:
    assert pool.run(polls_until_stopped, signalled, 3) == [(4, signalled == 0), (4, signalled == 1)]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_checkpoint_goes_on_where_it_was(pool: WorkerPool, recipe: Recipe, tmp_path: Path, ep_size: int) -> None:
    recipe = partitioned(recipe, ep_size)
    whole = pool.run(train_on_rank, Job(recipe))
    pool.run(train_on_rank, first_half(recipe, tmp_path))
    job = save_half_way(recipe, tmp_path)
    for found, expected in zip(pool.run(train_on_rank, job), whole, strict=True):
        torch.testing.assert_close(found.losses, expected.losses[job.first_step :], rtol=1e-4, atol=0)
