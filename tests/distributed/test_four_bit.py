"""A base in 4 bits under every stage of ZeRO trains as plain torch does on the same base with dequantised weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, assert_parity, build_engine, train_on_rank
from tests.plain_training import Training, make_base, make_recipe, train_plainly
from tests.rounded import dequantised

pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")

NUM_STEPS, TOLERANCE = 6, 1e-5
SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.0, "weight_decay": 1e-3, "max_grad_norm": 0.7}
EXPERTS = {"num_experts": 4, "top_k": 4, "lora_dropout": 0.2}  # all of them: rounding chooses nobody


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), hidden_size=32)  # 50 x 32 weights: no rank's piece is a whole row


@pytest.fixture(scope="module")
def plainly(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    other = dequantised(base, tmp_path_factory.mktemp("rounded") / "base")
    return train_plainly(make_recipe(other, adapter=EXPERTS, optim=SGD, max_steps=NUM_STEPS))


def recipe_of(base: Path, **train: Any) -> Recipe:
    recipe = make_recipe(base, adapter=EXPERTS, optim=SGD, max_steps=NUM_STEPS)
    return replace(recipe, model=replace(recipe.model, quantize="nf4"), train=replace(recipe.train, **train))


@pytest.mark.parametrize(
    ("stage", "world_size", "accumulation"), [(0, 2, 1), (1, 2, 2), (2, 2, 1), (3, 1, 2), (3, 2, 1), (3, 3, 2)]
)
def test_stages_and_ranks(
    worker_pool: PoolFactory, base: Path, plainly: Training, stage: int, world_size: int, accumulation: int
) -> None:
    job = Job(recipe_of(base), accumulation, zero={"stage": stage})
    assert_parity(worker_pool(world_size).run(train_on_rank, job), plainly, TOLERANCE)
    assert plainly.final_loss < plainly.losses[0] - 0.1, "it learns"


def test_layers_that_are_computed_again(worker_pool: PoolFactory, base: Path, plainly: Training) -> None:
    job = Job(recipe_of(base, activation_checkpointing=True))
    assert_parity(worker_pool(2).run(train_on_rank, job), plainly, TOLERANCE)


def test_experts_on_other_ranks(worker_pool: PoolFactory, base: Path, plainly: Training) -> None:
    recipe = recipe_of(base)
    job = Job(replace(recipe, parallel=replace(recipe.parallel, ep_size=2)))
    assert_parity(worker_pool(2).run(train_on_rank, job), plainly, TOLERANCE)


def test_other_ranks_go_on(worker_pool: PoolFactory, base: Path, plainly: Training, tmp_path: Path) -> None:
    half = NUM_STEPS // 2
    worker_pool(2).run(train_on_rank, Job(recipe_of(base), last_step=half, save_to=tmp_path))
    job = Job(recipe_of(base), first_step=half, load_from=tmp_path / f"checkpoint-{half}")
    for share in worker_pool(3).run(train_on_rank, job):
        torch.testing.assert_close(share.losses, plainly.losses[half:], rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(share.final_loss, plainly.final_loss, rtol=TOLERANCE, atol=0)


def held_of_base(job: Job, folder: str) -> dict[str, Any]:
    """What this rank holds of a base that was just loaded."""
    from dsmoelora.adapters.four_bit import packed_layers
    from dsmoelora.parallel import zero

    engine = build_engine(job)
    engine.save_adapter(Path(folder))
    layers = packed_layers(engine.model)
    return {
        "bytes": sum(getattr(one.weight, "ds_tensor", one.weight).numel() * 4 for one in layers.values()),
        "whole": sum(zero.full_numel(one.weight) * 4 for one in layers.values()),
        "names": sorted(layers),
        "head": type(engine.model.lm_head).__name__,
        "bad": engine.first_not_finite(),
        "fingerprint": engine.base_fingerprint,
    }


def test_a_rank_holds_its_share_of_four_and_a_half_bits(worker_pool: PoolFactory, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from dsmoelora.adapters.fingerprint import fingerprint

    found = worker_pool(2).run(held_of_base, Job(recipe_of(base)), str(tmp_path / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = [tensor for name, tensor in model.named_parameters() if name.endswith("_proj.weight")]
    assert {one["whole"] for one in found} == {sum(weight.numel() for weight in weights) * 9 // 16}
    for one in found:
        assert one["bytes"] <= one["whole"] / 2 + 4 * len(weights), "no rank holds more than its half"
        assert len(one["names"]) == len(weights) == 7 and one["head"] == "Linear"
        assert one["bad"] is None
        assert one["fingerprint"] == fingerprint(model.named_parameters()), "it is that of the base as it came"
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["base_quantization"] == "nf4"


def refused(job: Job) -> str:
    from dsmoelora.errors import UserError

    try:
        build_engine(job)
    except UserError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_weight_that_is_not_finite(worker_pool: PoolFactory, base: Path, tmp_path: Path, stage: int) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(base)
    job = Job(replace(recipe, model=replace(recipe.model, path=str(tmp_path))), zero={"stage": stage})
    for said in worker_pool(2).run(refused, job):
        assert "model.layers.0.mlp.up_proj.weight with numbers that are not finite" in said


def test_experts_that_start_from_the_gradient(worker_pool: PoolFactory, base: Path, tmp_path: Path) -> None:
    other = dequantised(base, tmp_path / "rounded")
    losses = []
    for path, quantize in ((base, "nf4"), (other, "none")):
        recipe = recipe_of(path)
        model, adapter = replace(recipe.model, quantize=quantize), replace(recipe.adapter, init="gradient")
        shares = worker_pool(2).run(train_on_rank, Job(replace(recipe, model=model, adapter=adapter)))
        losses.append([*shares[0].losses, shares[0].final_loss])
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=0)
