"""A router of a decoder layer, whose modules are its experts, learns under ZeRO what it learns in plain torch code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.config import LossesConfig, Recipe
from tests.conftest import PoolFactory
from tests.distributed.test_styles import Finished, finish_on_rank
from tests.engine_ranks import Job, Share, assert_parity, put_together, train_on_rank
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

NUM_STEPS, HALF = 6, 3
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]
MILORA = {"style": "decoder_layer", "router": "prompt", "pooling": "attention", "num_experts": 4, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    base = make_base(tmp_path_factory.mktemp("base"))
    adapter = MILORA | {"target_modules": MODULES, "lora_modules": ["o_proj"]}
    return make_recipe(base, adapter=adapter, optim=SGD, max_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def expected(recipe: Recipe) -> Training:
    return train_plainly(recipe)


def test_the_reference_learns_and_its_routers_do(recipe: Recipe, expected: Training) -> None:
    assert expected.final_loss < 0.99 * expected.losses[0]
    routers = {name: value for name, value in expected.weights.items() if ".router." in name}
    assert list(routers) == [f"model.layers.0.router.{name}" for name in ("weight", "pooling_weight")]
    assert all(value.any() for value in routers.values()), "the vector of the pooling starts at 0"


def shares_of(jobs: list[Job]) -> list[Share]:
    """Of several jobs one after the other; called on every rank."""
    return [train_on_rank(job) for job in jobs]


def recomputed(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, activation_checkpointing=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_stages_ranks_accumulation_and_recomputation_change_nothing(
    worker_pool: PoolFactory, recipe: Recipe, expected: Training, world_size: int
) -> None:
    jobs = [Job(recipe, zero={"stage": stage}) for stage in (0, 1, 2)]
    jobs += [Job(recomputed(recipe), 2), Job(recipe, zero={"stage3_param_persistence_threshold": 10**6})]
    shares = worker_pool(world_size).run(shares_of, jobs, timeout_s=300)
    for of_job in zip(*shares, strict=True):
        assert_parity(list(of_job), expected, 1e-5)


def test_the_balance_loss_is_the_same_on_every_number_of_ranks(worker_pool: PoolFactory, recipe: Recipe) -> None:
    job = Job(replace(recipe, losses=LossesConfig(balance=2.0)))
    (alone,) = worker_pool(1).run(train_on_rank, job)
    assert all(0 < losses["balance"] <= 4 for losses in alone.router_losses)
    for share in worker_pool(2).run(train_on_rank, job):
        assert share.losses == pytest.approx(alone.losses, rel=1e-5)
        for found, wanted in zip(share.router_losses, alone.router_losses, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_a_run_goes_on_with_other_ranks_and_leaves_an_adapter(
    worker_pool: PoolFactory, recipe: Recipe, expected: Training, tmp_path: Path
) -> None:
    first_half = worker_pool(2).run(train_on_rank, Job(recipe, last_step=HALF, save_to=tmp_path))
    job = Job(recipe, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    finished: list[Finished] = worker_pool(1).run(finish_on_rank, job, tmp_path / "adapter")
    (rank,) = finished
    assert rank.share.losses == pytest.approx(expected.losses[HALF:], rel=1e-5)
    assert rank.share.final_loss == pytest.approx(expected.final_loss, rel=1e-5)
    assert rank.loss == pytest.approx(first_half[0].final_loss, rel=1e-5)
    shapes = {name: value.shape for name, value in expected.weights.items()}
    written = put_together([share.numbers for share in first_half], "value", shapes)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors.items())
    base: Any = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    found = dict(load_adapter(base, tmp_path / "adapter").named_parameters())
    assert all(torch.equal(found[name], value) for name, value in written.items())
    assert len(rank.answers) == 1
