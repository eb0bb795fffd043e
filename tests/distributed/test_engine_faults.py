"""What hung, or silently went wrong, elsewhere: one-sided routing, numbers that are not finite, idle parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, Pieces, batches_of, build_engine, numbers_of, put_together
from tests.plain_training import ADAMW, SGD, make_base, make_recipe, train_plainly

NUM_STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def recipe_of(base: Path, **adapter: Any) -> Recipe:
    optim = ADAMW | {"warmup_steps": 0}
    return make_recipe(base, adapter=adapter, optim=optim, max_steps=NUM_STEPS, seed=33)


@dataclass
class Told:
    """What a rank tells of a training with a mishap in it."""

    losses: list[float]
    skipped: list[bool]
    skipped_steps: int
    step: int
    num_optimizer_steps: int
    numbers: list[dict[str, Pieces]]  # before the first step and after each


def spoil_gradient(_: Any, __: Any, output: Tensor) -> None:
    """A forward hook after which the loss is fine and gradients are not."""
    if output.requires_grad:
        output.register_hook(lambda grad: grad * torch.nan)


def spoil_logits(_: Any, __: Any, output: Tensor) -> Tensor:
    """A forward hook after which the loss is infinite or no number at all."""
    return output + torch.inf


MISHAPS = {"gradient": ("model.layers.0.mlp", spoil_gradient), "loss": ("lm_head", spoil_logits)}


def train_with_a_mishap(job: Job, kind: str, bad_rank: int, bad_step: int, bad_micro_batch: int) -> Told:
    """Train; in one micro-batch of one step of one rank something is not finite."""
    from dsmoelora.parallel import comm

    engine = build_engine(job)
    told = Told([], [], 0, 0, 0, [numbers_of(engine)])
    where, hook = MISHAPS[kind]
    num_calls = 0

    def sometimes(module: Any, inputs: Any, output: Tensor) -> Any:
        nonlocal num_calls
        num_calls += 1
        is_now = num_calls - 1 == bad_step * job.accumulation + bad_micro_batch
        return hook(module, inputs, output) if comm.rank() == bad_rank and is_now else None

    engine.model.get_submodule(where).register_forward_hook(sometimes)
    for step in range(NUM_STEPS):
        result = engine.train_step(batches_of(job, step))
        told.losses.append(result.loss)
        told.skipped.append(result.skipped)
        told.numbers.append(numbers_of(engine))
    told.skipped_steps, told.step, told.num_optimizer_steps = (
        engine.skipped_steps,
        engine.step,
        engine.optimizer.num_steps,
    )
    return told


def same(one: dict[str, Pieces], other: dict[str, Pieces]) -> bool:
    pairs = [
        (piece, other[kind][name][i])
        for kind, tensors in one.items()
        for name, pieces in tensors.items()
        for i, piece in enumerate(pieces)
    ]
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "bad_rank", "bad_micro_batch"), [("gradient", 1, 0), ("gradient", 2, 1), ("loss", 0, 1), ("loss", 1, 0)]
)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(
    worker_pool: PoolFactory, base: Path, kind: str, bad_rank: int, bad_micro_batch: int, dtype: Any
) -> None:
    recipe = recipe_of(base)
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))
    bad_step = 2
    ranks = worker_pool(3).run(train_with_a_mishap, Job(recipe, 2), kind, bad_rank, bad_step, bad_micro_batch)
    for told in ranks:
        assert told.skipped == [False, False, True, False], "all ranks skip, and only this step"
        assert (told.skipped_steps, told.step, told.num_optimizer_steps) == (1, NUM_STEPS, NUM_STEPS - 1)
        assert same(told.numbers[bad_step + 1], told.numbers[bad_step]), "neither values nor moments move"
        assert not same(told.numbers[bad_step + 2], told.numbers[bad_step + 1]), "the next step is a step again"
        losses = torch.tensor(told.losses)
        assert losses.isfinite().tolist() == [kind == "gradient" or step != bad_step for step in range(NUM_STEPS)]
        assert losses[3] < losses[1], "they are of the same tokens"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_skipped_step_leaves_nothing_in_the_gradients_on_the_host(
    worker_pool: PoolFactory, base: Path, stage: int, accumulation: int, dtype: Any
) -> None:
    """All steps are those of a run whose optimizer is on the device, but for the rounding of fp32 sums."""
    recipe = recipe_of(base)
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))
    on_device = Job(recipe, accumulation, zero={"stage": 2}, partitioned=False)
    on_host = replace(on_device, zero={"stage": stage, "offload_optimizer": {"device": "cpu"}})
    expected, *_ = worker_pool(2).run(train_with_a_mishap, on_device, "gradient", 1, 1, 0)
    told, *_ = worker_pool(2).run(train_with_a_mishap, on_host, "gradient", 1, 1, 0)
    assert told.skipped == expected.skipped == [False, True, False, False]
    torch.testing.assert_close(told.losses, expected.losses, rtol=1e-6, atol=0)
    for kind, tensors in expected.numbers[-1].items():
        for name, pieces in tensors.items():
            for (*_, values), (*_, found) in zip(pieces, told.numbers[-1][kind][name], strict=True):
                torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-7)


def make_all_tokens_equal(base: Path, folder: Path) -> Path:
    """A copy of the model in which all tokens have one embedding, so that routers cannot tell them apart."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    same_for_all = embedding[5].expand_as(embedding).contiguous()
    save_file(tensors | {"model.embed_tokens.weight": same_for_all}, folder / "model.safetensors", {"format": "pt"})
    return folder


def train_and_watch(job: Job) -> tuple[list[float], dict[str, dict[str, float]], dict[str, Pieces]]:
    engine = build_engine(job)
    engine.watch.start()
    results = [engine.train_step(batches_of(job, step)) for step in range(NUM_STEPS)]
    return [result.loss for result in results], engine.watch.stop(), numbers_of(engine)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_no_rank_waits_when_all_tokens_go_to_the_same_experts(
    worker_pool: PoolFactory, base: Path, tmp_path: Path, world_size: int, top_k: int
) -> None:
    model = make_all_tokens_equal(base, tmp_path / "equal")
    recipe = make_recipe(model, adapter={"top_k": top_k}, optim=SGD | {"warmup_steps": 0}, max_steps=NUM_STEPS)
    ranks = worker_pool(world_size).run(train_and_watch, Job(recipe, 2), timeout_s=60)
    expected = train_plainly(recipe)
    for losses, _, _ in ranks:
        torch.testing.assert_close(losses, expected.losses, rtol=1e-5, atol=0)
    shapes = {name: value.shape for name, value in expected.weights.items()}
    for name, value in put_together([numbers for *_, numbers in ranks], "value", shapes).items():
        torch.testing.assert_close(value, expected.weights[name], rtol=1e-5, atol=1e-6)
        if name.endswith("experts.b"):  # it started at 0
            assert not value.flatten(1).any(-1).all(), f"{name}: an expert that no token used has not moved"
    for name in ("v_proj", "down_proj"):
        assert any(value.any() for key, value in expected.weights.items() if key.endswith(f"{name}.experts.b"))


def test_the_watch_sees_every_tensor_learn(worker_pool: PoolFactory, base: Path) -> None:
    recipe = recipe_of(base)
    expected = train_plainly(recipe)
    for _, watched, _ in worker_pool(3).run(train_and_watch, Job(recipe, 2)):
        assert watched.keys() == expected.weights.keys()
        assert all(seen["grad_norm"] > 0 and seen["moved"] > 0 for seen in watched.values())
        for name, value in expected.weights.items():
            if name.endswith("experts.b"):  # it started at 0
                assert watched[name]["moved"] == pytest.approx(value.norm().item(), rel=1e-3)


def test_the_watch_names_a_tensor_that_does_not_learn(worker_pool: PoolFactory, base: Path) -> None:
    recipe = recipe_of(base)
    recipe = replace(recipe, optim=replace(recipe.optim, lr_router=0.0))
    ((_, watched, _),) = worker_pool(1).run(train_and_watch, Job(recipe))
    idle = {name for name, seen in watched.items() if seen["moved"] == 0}
    assert idle == {name for name in watched if name.endswith("router.weight")}
