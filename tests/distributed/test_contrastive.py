"""The contrastive losses under ZeRO are those of plain torch code, whatever ranks, accumulation and recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.config import LossesConfig, ParallelConfig, Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, assert_parity, train_on_rank
from tests.plain_training import ADAMW, Training, make_base, make_recipe, train_plainly

NUM_STEPS = 4
LOSSES = LossesConfig(
    contrastive=0.3, contrastive_coactive=0.2, contrastive_temperature=0.5, contrastive_tokens=4
)  # much more than usual, so that they decide what is learned


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
        pytest.param(4, 1, {}, id="4-ranks"),
        pytest.param(2, 2, {"recompute": True}, id="recomputed"),
        pytest.param(2, 1, {"zero": {"stage": 0}}, id="stage-0"),
        pytest.param(1, 1, {"loss_scale": 1024.0}, id="scaled-as-for-fp16"),
        pytest.param(2, 1, {"ep_size": 2}, id="partitioned-experts"),
        pytest.param(4, 2, {"ep_size": 2, "recompute": True}, id="partitioned-recomputed"),
        pytest.param(2, 1, {"ep_size": 2, "rows": (40, 8)}, id="partitioned-uneven-rows"),
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
    changed = replace(recipe, train=train, parallel=parallel)
    others = {name: settings[name] for name in ("zero", "rows", "loss_scale") if name in settings}
    job = Job(changed, accumulation, **others)
    shares = worker_pool(world_size).run(train_on_rank, job)
    assert_parity(shares, expected, 1e-4)
    for share in shares:
        for found, wanted in zip(share.router_losses, expected.router_losses, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
