"""Every expert with every router, preconditioner, start and style under ZeRO-3: learns, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from dsmoelora.config import InitName, LossesConfig, OptimConfig, Recipe
from dsmoelora.config.adapter_options import EXPERTS, ROUTERS
from dsmoelora.errors import ConfigError
from tests.conftest import PoolFactory, release
from tests.engine_ranks import Job, batches_of, build_engine, start_batches_of
from tests.expert_parallel import DAMPED, partitioned
from tests.plain_training import make_base, make_recipe

NUM_STEPS = 3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "none": {"name": "adamw", "lr": 3e-3},
    "scaled": {"name": "sgd", "lr": 0.03, "momentum": 0.9} | DAMPED,
    "tangent": {"name": "adamw", "lr": 3e-3} | DAMPED,
}
STYLES: dict[str, dict[str, Any]] = {
    "per_linear": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ffn_block": {"target_modules": ["up_proj", "down_proj"], "lora_modules": ["q_proj"]},
    "decoder_layer": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
}
TRAINED = [name for name, kind in ROUTERS.items() if kind.is_trained]
# (expert, init): what the refusal says
REFUSED = {("moslora", "svd"): "two factors and nothing else", ("dora", "svd"): "two factors and nothing else"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def recipe_of(base: Path, *, expert: str, router: str, preconditioner: str, init: str, style: str) -> Recipe:
    """A few steps with four experts a layer and, but for free gates, a loss of the routers."""
    adapter = {"expert": expert, "router": router, "init": init, "style": style, "num_experts": 4, **STYLES[style]}
    optim = OPTIMIZERS[preconditioner] | {"preconditioner": preconditioner, "warmup_steps": 0}
    if "top_k" not in ROUTERS[router].options:
        adapter["top_k"] = None
    recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=NUM_STEPS)
    has_logits = recipe.adapter.router_start not in ("mean", "sum")
    return replace(recipe, losses=LossesConfig(z=1e-3 if has_logits else 0.0))


def losses_of(recipes: list[Recipe]) -> list[list[float]]:
    """Of the steps of each recipe, and at the end the held-out loss; called on every rank."""
    found = []
    for recipe in recipes:
        job = Job(recipe)
        engine = build_engine(job)
        if engine.awaits_start:
            engine.draw_start(start_batches_of(job))
        results = [engine.train_step(batches_of(job, 0)) for _ in range(NUM_STEPS)]
        assert not any(result.skipped for result in results), recipe.adapter
        found.append([*(result.loss for result in results), engine.evaluate(batches_of(job, 0))])
    return found


def assert_all_learn(worker_pool: PoolFactory, recipes: list[Recipe]) -> None:
    """The same batch again and again has a lower loss at the end; every other recipe with partitioned experts."""
    placed = [
        recipe if recipe.adapter.style == "decoder_layer" else partitioned(recipe, 1 + number % 2)
        for number, recipe in enumerate(recipes)
    ]
    shares = worker_pool(2).run(losses_of, placed, timeout_s=300)
    for recipe, *losses in zip(placed, *shares, strict=True):
        assert losses[0] == losses[1]
        assert losses[0][-1] < losses[0][0], (recipe.adapter, recipe.parallel, losses[0])


def in_turn() -> Iterator[tuple[str, str, str]]:
    """Every pair of expert, router and preconditioner, though not every three together."""
    for (place, expert), (turn, router) in product(enumerate(EXPERTS), enumerate(TRAINED)):
        yield expert, router, [*OPTIMIZERS][(place + turn) % len(OPTIMIZERS)]


def test_every_pair_occurs() -> None:
    assert set(get_args(get_type_hints(OptimConfig)["preconditioner"])) == set(OPTIMIZERS)
    for one, other in combinations(range(3), 2):
        names = (EXPERTS, TRAINED, OPTIMIZERS)
        assert {(case[one], case[other]) for case in in_turn()} == set(product(names[one], names[other]))


@pytest.mark.parametrize("router", TRAINED)
def test_every_expert_with_every_router(worker_pool: PoolFactory, base: Path, router: str) -> None:
    recipes = [
        recipe_of(base, expert=expert, router=router, preconditioner=preconditioner, init="kaiming", style="per_linear")
        for expert, of, preconditioner in in_turn()
        if of == router
    ]
    assert_all_learn(worker_pool, recipes)


@release
@pytest.mark.parametrize("router", TRAINED)
def test_every_expert_with_every_router_and_preconditioner(worker_pool: PoolFactory, base: Path, router: str) -> None:
    recipes = [
        recipe_of(base, expert=expert, router=router, preconditioner=preconditioner, init="kaiming", style="per_linear")
        for expert, preconditioner in product(EXPERTS, OPTIMIZERS)
    ]
    assert_all_learn(worker_pool, recipes)


@release
def test_every_expert_with_every_start_and_style(worker_pool: PoolFactory, base: Path) -> None:
    recipes, refused = [], set()
    for number, (expert, init, style) in enumerate(product(EXPERTS, get_args(InitName), STYLES)):
        router = "prompt" if style == "decoder_layer" else TRAINED[number % len(TRAINED)]
        rest = {"router": router, "preconditioner": [*OPTIMIZERS][number % len(OPTIMIZERS)]}
        try:
            recipes.append(recipe_of(base, expert=expert, init=init, style=style, **rest))
        except ConfigError as error:
            if style == "decoder_layer" and init == "svd" and expert == "lora":
                assert "whose gates do not sum to 1 in any layer" in str(error)
                continue
            assert REFUSED[expert, init] in str(error)
            refused.add((expert, init))
    assert refused == {pair for pair in REFUSED if pair[0] in EXPERTS}
    assert_all_learn(worker_pool, recipes)
