"""Experts that start from what 4 bits lose, under every stage of ZeRO: what plain torch makes of the same start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.folder_files import TAKEN_FILE
from dsmoelora.adapters.four_bit import packed_layers, unpacked
from dsmoelora.adapters.starts.svd import uniform_gates
from dsmoelora.config import Recipe
from dsmoelora.errors import CheckpointError, ModelError
from dsmoelora.export.experts import expert_loras, read_experts
from dsmoelora.model import find_trained, model_for_inference
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, build_engine, train_on_rank
from tests.plain_loftq import PlainLoftq, plain_loftq, rounded
from tests.plain_training import Training, make_base, make_recipe, mean_loss, train_plainly

pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")

NUM_STEPS, TOLERANCE = 6, 1e-5
SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.0, "weight_decay": 1e-3, "max_grad_norm": 0.7}
EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 4, "r": 2}  # all of them: rounding chooses nobody
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), hidden_size=32)


@pytest.fixture(scope="module")
def found(base: Path) -> dict[str, PlainLoftq]:
    """By the name of the layer."""
    weights = {name.removesuffix(".weight"): one for name, one in load_file(base / "model.safetensors").items()}
    return {name: plain_loftq(one, 4, 4, 2, 3) for name, one in weights.items() if name.endswith(TARGETS)}


@pytest.fixture(scope="module")
def plainly(base: Path, found: dict[str, PlainLoftq], tmp_path_factory: pytest.TempPathFactory) -> Training:
    """On a base with the weights as packed, from factors of the same products."""
    folder = tmp_path_factory.mktemp("packed")
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            own = found.get(name.removesuffix(".weight"))
            tensors[name] = rounded(weight) if own is None else own.kept_OD.float().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def start(model: Any) -> None:
        for name, layer in adapted_layers(model):
            for expert, part_OD in enumerate(found[name].parts_EOD):
                u, singular, v_t = torch.linalg.svd(4 / layer.experts.scale * part_OD)
                with torch.no_grad():
                    layer.experts.a[expert] = v_t[:2].T * singular[:2].sqrt()
                    layer.experts.b[expert] = u[:, :2] * singular[:2].sqrt()

    return train_plainly(make_recipe(folder, adapter=EXPERTS, optim=SGD, max_steps=NUM_STEPS), start=start)


def recipe_of(base: Path) -> Recipe:
    recipe = make_recipe(base, adapter=EXPERTS, optim=SGD, max_steps=NUM_STEPS)
    model, adapter = replace(recipe.model, quantize="nf4"), replace(recipe.adapter, init="loftq")
    return replace(recipe, model=model, adapter=adapter)


def losses_are_those(shares: Any, expected: Training, first: int = 0) -> None:
    """Factors may have other signs than the reference's, so losses and norms are compared."""
    for share in shares:
        torch.testing.assert_close(share.losses, expected.losses[first:], rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(share.grad_norms, expected.grad_norms[first:], rtol=1e-4, atol=0)
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(("stage", "world_size", "ep_size"), [(0, 1, 1), (2, 2, 1), (3, 2, 1), (3, 2, 2)])
def test_stages_and_ranks(
    worker_pool: PoolFactory, base: Path, plainly: Training, stage: int, world_size: int, ep_size: int
) -> None:
    recipe = recipe_of(base)
    recipe = replace(recipe, parallel=replace(recipe.parallel, ep_size=ep_size))
    losses_are_those(worker_pool(world_size).run(train_on_rank, Job(recipe, zero={"stage": stage})), plainly)
    assert plainly.final_loss < plainly.losses[0] - 0.1, "it learns"


def test_other_ranks_go_on(worker_pool: PoolFactory, base: Path, plainly: Training, tmp_path: Path) -> None:
    """The base is packed anew, from its weights alone, and is the same."""
    half = NUM_STEPS // 2
    worker_pool(2).run(train_on_rank, Job(recipe_of(base), last_step=half, save_to=tmp_path))
    job = Job(recipe_of(base), first_step=half, load_from=tmp_path / f"checkpoint-{half}")
    losses_are_those(worker_pool(1).run(train_on_rank, job), plainly, half)


def saved(job: Job, folder: str) -> float:
    """Trains, writes the adapter, and gives the loss after it."""
    from tests.engine_ranks import batches_of

    engine = build_engine(job)
    for step in range(3):
        engine.train_step(batches_of(job, step))
    engine.save_adapter(Path(folder))
    loss: float = engine.evaluate(batches_of(job, 0))
    return loss


@pytest.mark.usefixtures("computes_in_fp32")
def test_what_is_saved_finds_its_base_again(
    worker_pool: PoolFactory, base: Path, found: dict[str, PlainLoftq], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    losses = worker_pool(2).run(saved, Job(recipe_of(base)), str(folder))
    trained = find_trained(folder, None, quantize="nf4")
    model = trained.load()
    for name, layer in packed_layers(model).items():
        own = found.get(name.removesuffix(".base.weight"))
        if own is not None:
            torch.testing.assert_close(unpacked(layer.weight, layer.shape, torch.float32), own.kept_OD.float())
    with torch.no_grad():
        assert float(mean_loss(model, 0, 0)) == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(ModelError, match=r"q_proj\.weight was packed without what adapter\.init loftq takes off it"):
        load_adapter(trained.load_base(), folder)
    (folder / TAKEN_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no taken\.safetensors, without which an adapter"):
        trained.load()


def test_what_is_exported_goes_without_the_start(
    worker_pool: PoolFactory, base: Path, found: dict[str, PlainLoftq], tmp_path: Path
) -> None:
    """An expert that has learned nothing yet: its own part, without the mean that the base in 16 bits does not lack."""
    worker_pool(1).run(written, Job(recipe_of(base)), str(tmp_path / "adapter"))
    config, experts = read_experts(tmp_path / "adapter")
    for expert, lora in enumerate(expert_loras(config, experts).values()):
        assert lora.r == config.r * (1 + config.num_experts)
        for name, (a_RD, b_OR) in lora.layers.items():
            parts_EOD = 4 * found[name].parts_EOD
            expected_OD = parts_EOD[expert] - parts_EOD.mean(0)
            update_OD = lora.alpha / lora.r * b_OR.double() @ a_RD.double()
            torch.testing.assert_close(update_OD, expected_OD, rtol=1e-4, atol=1e-6)


def written(job: Job, folder: str) -> None:
    """The adapter as it starts."""
    build_engine(job).save_adapter(Path(folder))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 28).view(2, 12)).logits
    return found


@pytest.mark.usefixtures("computes_in_fp32")
def test_on_a_base_in_16_bits_nothing_is_made_up_for(worker_pool: PoolFactory, base: Path, tmp_path: Path) -> None:
    """There nothing was lost: before the first step the adapter does nothing, whichever base it is put on or leaves."""
    folder = tmp_path / "adapter"
    worker_pool(1).run(written, Job(recipe_of(base)), str(folder))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    with uniform_gates(model):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    in_four_bits = find_trained(folder, None, quantize="nf4").load()
    with uniform_gates(in_four_bits):
        nearer = (logits(in_four_bits) - plain).norm()
    assert nearer < 0.9 * (logits(model_for_inference(str(base), "", quantize="nf4")) - plain).norm()
