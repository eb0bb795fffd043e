"""Every router under ZeRO-3 learns what it learns in plain torch code, whatever ranks, accumulation and placement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoelora.adapters import ExpertBank
from dsmoelora.config import ParallelConfig, Recipe
from tests.conftest import PoolFactory, thorough
from tests.engine_ranks import Job, assert_parity, train_on_rank
from tests.plain_training import SGD, global_batch, make_base, make_recipe, train_plainly

NUM_STEPS, HALF, NUM_LAYERS = 6, 3, 3
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": None},
    "noisy_topk": {},
    "top_p": {"top_k": None, "top_p": 0.6},
    "threshold": {"top_k": None},
    "sigmoid_bias": {"bias_rate": 0.05},
    "prompt": {},
    "attention": {"router": "prompt", "pooling": "attention"},
    "falling_k": {"router": "sigmoid_bias", "bias_rate": 0.05, "top_k_warmup": 5},
    "constant": {"top_k": None, "router_start": "mean"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def recipe_with(base: Path, router: str) -> Recipe:
    adapter = {"router": router, "num_experts": 6, "lora_dropout": 0.1} | ROUTERS[router]
    return make_recipe(base, adapter=adapter, optim=SGD, max_steps=NUM_STEPS)


@contextmanager
def watch_choices() -> Iterator[list[int]]:
    """A list that gets, for every call of a router, how many choices of real tokens a slight change of x would turn."""
    turned: list[int] = []
    is_checking = False

    def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal is_checking
        if is_checking or isinstance(module, ExpertBank) or not getattr(module, "shapes", None):
            return
        is_checking = True
        x_TD: Tensor = inputs[0]
        slight_TD = 1e-5 * x_TD.abs().mean() * torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            changed_TE = ((module(x_TD + slight_TD) != 0) != (output != 0)).any(-1)
        step = len(turned) // NUM_LAYERS  # the last call, an evaluation, sees the batch of step 0 again
        real_T = masks[step % 2].flatten().bool()
        turned.append(int(changed_TE[real_T].sum()))
        is_checking = False

    masks = [global_batch(0)[1], global_batch(1)[1]]
    handle = nn.modules.module.register_module_forward_hook(check)
    try:
        yield turned
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("stage", "world_size", "accumulation", "ep_size"), [(3, 2, 2, 2), thorough(3, 3, 2, 1), thorough(0, 2, 1, 1)]
)
@pytest.mark.parametrize("router", ROUTERS)
def test_stage_ranks_accumulation_and_placement_change_nothing(
    worker_pool: PoolFactory,
    base: Path,
    router: str,
    stage: int,
    world_size: int,
    accumulation: int,
    ep_size: int,
) -> None:
    recipe = recipe_with(base, router)
    with watch_choices() as turned:
        expected = train_plainly(recipe)
    assert turned and not any(turned), "with another seed no token is near the border between two choices"
    placed = replace(recipe, parallel=ParallelConfig(ep_size=ep_size))
    job = Job(placed, accumulation, zero={"stage": stage})
    assert_parity(worker_pool(world_size).run(train_on_rank, job), expected, 1e-5)


def test_selection_biases_are_part_of_a_checkpoint(worker_pool: PoolFactory, base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(base, "sigmoid_bias")
    expected = train_plainly(recipe)
    worker_pool(2).run(train_on_rank, Job(recipe, 2, last_step=HALF, save_to=tmp_path))
    job = Job(recipe, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    for share in worker_pool(3).run(train_on_rank, job):
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=1e-5, atol=0)


def test_a_run_that_goes_on_while_k_falls_takes_the_same_steps_to_the_last_bit(
    worker_pool: PoolFactory, base: Path, tmp_path: Path
) -> None:
    recipe = replace(recipe_with(base, "falling_k"), parallel=ParallelConfig(ep_size=2, exchange="all_to_all"))
    pool = worker_pool(2)
    expected = pool.run(train_on_rank, Job(recipe, 2))
    pool.run(train_on_rank, Job(recipe, 2, last_step=HALF, save_to=tmp_path))
    gone_on = pool.run(train_on_rank, Job(recipe, 2, HALF, load_from=tmp_path / f"checkpoint-{HALF}"))
    for share, whole in zip(gone_on, expected, strict=True):
        assert (share.losses, share.final_loss) == (whole.losses[HALF:], whole.final_loss)
