"""`constant` and `arrow` under ZeRO: the numbers of one device, at every placement, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsmoelora import inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.given import settings_of
from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.distributed.test_freeze import train
from tests.engine_ranks import Job, assert_parity
from tests.expert_parallel import partitioned
from tests.given_adapters import peft_adapter
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 4
TARGETS = ["q_proj", "v_proj", "down_proj"]
UNTRAINED = {key: value for key, value in SGD.items() if key != "lr_router"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cat": ({"router": "constant", "router_start": "softmax", "freeze": ["a", "b"]}, SGD | {"lr_router": 1.0}),
    "sum": ({"router": "constant", "router_start": "sum"}, SGD),
    "arrow": ({"router": "arrow", "router_temperature": 0.5, "top_k": 2}, UNTRAINED),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Training]]:
    folder = tmp_path_factory.mktemp("given")
    base = make_base(folder / "base")
    paths = [
        str(peft_adapter(base, folder / str(seed), seed, r=3, lora_alpha=6, target_modules=TARGETS)) for seed in (1, 2)
    ]
    found = {}
    for name, (settings, optim) in RUNS.items():
        adapter = settings_of(paths, {}) | {"experts_from": paths, "top_k": None} | settings
        recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=WHOLE, seed=3)
        found[name] = recipe, train_plainly(recipe)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_references_learn(references: dict[str, tuple[Recipe, Training]], name: str) -> None:
    """What the comparisons below rest on."""
    _, expected = references[name]
    assert expected.final_loss < expected.losses[0] - (1e-4 if name == "cat" else 1e-2)


@pytest.mark.parametrize(
    ("name", "world_size", "ep_size", "settings"),
    [
        ("cat", 1, 1, {"zero": {"stage": 0}, "partitioned": False}),
        ("cat", 2, 1, {"accumulation": 2}),
        ("sum", 2, 2, {}),
        ("arrow", 2, 1, {"zero": {"stage": 2}}),
        ("arrow", 2, 2, {"partitioned": False}),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory,
    references: dict[str, tuple[Recipe, Training]],
    tmp_path: Path,
    name: str,
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = references[name]
    job = Job(partitioned(recipe, ep_size), **settings)
    assert_parity(worker_pool(world_size).run(train, job, tmp_path / "adapter"), expected, 1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_elsewhere(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]], tmp_path: Path, name: str
) -> None:
    """Arrow's directions are in the checkpoint and in the adapter's folder, as they were when the run began."""
    recipe, expected = references[name]
    worker_pool(2).run(train, Job(recipe, last_step=HALF, save_to=tmp_path), tmp_path / "half")
    job = Job(partitioned(recipe, 2), first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    for share in worker_pool(2).run(train, job, tmp_path / "whole"):
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)
    if name == "arrow":
        model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
        inject(model, recipe.adapter)
        saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        for layer, adapted in adapted_layers(model):
            assert torch.equal(saved[f"{layer}.router.weight"], adapted.router.weight)
