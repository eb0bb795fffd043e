"""The routers' losses under ZeRO-3 are those of plain torch code, whatever ranks, accumulation and recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.config import LossesConfig, ParallelConfig, Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, Share, assert_parity, train_on_rank
from tests.plain_training import ADAMW, Training, make_base, make_recipe, train_plainly

NUM_STEPS, HALF = 6, 3
LOSSES = LossesConfig(balance=2.0, z=0.1)  # much more than usual, so that they decide what is learned


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plainly(base: Path) -> tuple[Recipe, Training]:
    recipe = make_recipe(
        base, adapter={"lora_dropout": 0.1, "num_experts": 6}, optim=ADAMW, max_steps=NUM_STEPS, seed=33
    )
    recipe = replace(recipe, losses=LOSSES)
    return recipe, train_plainly(recipe)


def assert_losses(shares: list[Share], expected: list[dict[str, float]]) -> None:
    for share in shares:
        for found, wanted in zip(share.router_losses, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_the_reference_feels_the_losses(plainly: tuple[Recipe, Training]) -> None:
    recipe, expected = plainly
    assert expected.smallest_gap > 1e-4
    without = train_plainly(replace(recipe, losses=LossesConfig()))
    assert abs(without.final_loss - expected.final_loss) > 1e-3


@pytest.mark.parametrize(
    ("world_size", "accumulation", "settings"),
    [
        pytest.param(1, 1, {}, id="1-rank"),
        pytest.param(2, 4, {}, id="accumulated"),
        pytest.param(3, 2, {}, id="3-ranks"),
        pytest.param(2, 2, {"recompute": True}, id="recomputed"),
        pytest.param(2, 1, {"zero": {"stage": 2}}, id="stage-2"),
        pytest.param(2, 1, {"ep_size": 2}, id="partitioned-experts"),
        pytest.param(1, 1, {"loss_scale": 1024.0}, id="scaled-as-for-fp16"),
    ],
)
def test_values_and_weights_are_those_of_plain_torch(
    worker_pool: PoolFactory,
    plainly: tuple[Recipe, Training],
    world_size: int,
    accumulation: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = plainly
    train = replace(recipe.train, activation_checkpointing="recompute" in settings)
    parallel = ParallelConfig(ep_size=settings.get("ep_size", 1))
    others = {name: settings[name] for name in ("zero", "loss_scale") if name in settings}
    job = Job(replace(recipe, train=train, parallel=parallel), accumulation, **others)
    shares = worker_pool(world_size).run(train_on_rank, job)
    assert_parity(shares, expected, 1e-4)
    assert_losses(shares, expected.router_losses)


def test_a_resumed_run_knows_the_counts_of_the_step_before(
    worker_pool: PoolFactory, plainly: tuple[Recipe, Training], tmp_path: Path
) -> None:
    recipe, expected = plainly
    worker_pool(2).run(train_on_rank, Job(recipe, 2, last_step=HALF, save_to=tmp_path))
    job = Job(recipe, 1, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    shares = worker_pool(3).run(train_on_rank, job)
    rest = replace(
        expected,
        losses=expected.losses[HALF:],
        grad_norms=expected.grad_norms[HALF:],
        lrs=expected.lrs[HALF:],
    )
    for share in shares:
        assert share.losses == pytest.approx(rest.losses, rel=1e-5)
        assert share.grad_norms == pytest.approx(rest.grad_norms, rel=1e-4)
        assert share.final_loss == pytest.approx(rest.final_loss, rel=1e-5)
    assert_losses(shares, expected.router_losses[HALF:])
