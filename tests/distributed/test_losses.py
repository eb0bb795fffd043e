"""Losses of routers and experts under ZeRO are those of plain torch, whatever ranks, accumulation and recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.config import LossesConfig, ParallelConfig, Recipe
from tests.conftest import PoolFactory, release
from tests.engine_ranks import Job, Share, assert_parity, train_on_rank
from tests.plain_training import ADAMW, Training, make_base, make_recipe, train_plainly

NUM_STEPS, HALF = 6, 3
# Weights are much larger than usual, so that the losses decide what is learned.
FAMILIES = {
    "routers": LossesConfig(balance=2.0, z=0.1),
    "contrastive": LossesConfig(
        contrastive=0.3, contrastive_coactive=0.2, contrastive_temperature=0.5, contrastive_tokens=4
    ),
}
Trained = dict[str, tuple[Recipe, Training]]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """For each family of losses a recipe, and what plain torch makes of it."""
    base = make_base(tmp_path_factory.mktemp("base"))
    adapter = {"lora_dropout": 0.1, "num_experts": 6}
    recipe = make_recipe(base, adapter=adapter, optim=ADAMW, max_steps=NUM_STEPS, seed=40)
    recipes = {family: replace(recipe, losses=losses) for family, losses in FAMILIES.items()}
    return {family: (recipe, train_plainly(recipe)) for family, recipe in recipes.items()}


def assert_losses(shares: list[Share], expected: list[dict[str, float]]) -> None:
    for share in shares:
        for found, wanted in zip(share.router_losses, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


@every_family
def test_the_reference_feels_the_losses(trained: Trained, family: str) -> None:
    recipe, expected = trained[family]
    assert expected.smallest_gap > 1e-4
    without = train_plainly(replace(recipe, losses=LossesConfig()))
    assert abs(without.final_loss - expected.final_loss) > 1e-3


@every_family
@pytest.mark.parametrize(
    ("world_size", "accumulation", "settings"),
    [
        pytest.param(1, 1, {}, id="1-rank"),
        pytest.param(2, 4, {}, id="accumulated"),
        pytest.param(3, 2, {}, id="3-ranks", marks=release),
        pytest.param(2, 2, {"recompute": True}, id="recomputed", marks=release),
        pytest.param(2, 1, {"zero": {"stage": 0}}, id="stage-0"),
        pytest.param(2, 2, {"fillers": True}, id="rows-that-do-not-count"),
        pytest.param(2, 1, {"zero": {"stage": 2}}, id="stage-2", marks=release),
        pytest.param(1, 1, {"loss_scale": 1024.0}, id="scaled-as-for-fp16"),
        pytest.param(2, 1, {"ep_size": 2}, id="partitioned-experts", marks=release),
        pytest.param(4, 2, {"ep_size": 2, "recompute": True}, id="partitioned-recomputed"),
        pytest.param(2, 1, {"ep_size": 2, "rows": (40, 8)}, id="partitioned-uneven-rows"),
    ],
)
def test_values_and_weights_are_those_of_plain_torch(
    worker_pool: PoolFactory,
    trained: Trained,
    family: str,
    world_size: int,
    accumulation: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = trained[family]
    train = replace(recipe.train, activation_checkpointing="recompute" in settings)
    parallel = ParallelConfig(ep_size=settings.get("ep_size", 1))
    others = {name: settings[name] for name in ("zero", "rows", "loss_scale", "fillers") if name in settings}
    job = Job(replace(recipe, train=train, parallel=parallel), accumulation, **others)
    shares = worker_pool(world_size).run(train_on_rank, job)
    assert_parity(shares, expected, 1e-4)
    assert_losses(shares, expected.router_losses)


@every_family
def test_a_resumed_run_goes_on_with_the_same_losses(
    worker_pool: PoolFactory, trained: Trained, family: str, tmp_path: Path
) -> None:
    """The balance loss needs the counts of the step before."""
    recipe, expected = trained[family]
    worker_pool(2).run(train_on_rank, Job(recipe, 2, last_step=HALF, save_to=tmp_path))
    job = Job(recipe, 1, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    shares = worker_pool(3).run(train_on_rank, job)
    for share in shares:
        assert share.losses == pytest.approx(expected.losses[HALF:], rel=1e-5)
        assert share.grad_norms == pytest.approx(expected.grad_norms[HALF:], rel=1e-4)
        assert share.final_loss == pytest.approx(expected.final_loss, rel=1e-5)
    assert_losses(shares, expected.router_losses[HALF:])
