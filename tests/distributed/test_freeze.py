"""Frozen roles under ZeRO: the numbers of one device, and what is frozen stays to the last bit, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from dsmoelora import inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.given import settings_of
from dsmoelora.config import Recipe
from dsmoelora.optim.rows import frozen_tensors
from tests.conftest import PoolFactory, release
from tests.engine_ranks import Job, Share, assert_parity, batches_of, build_engine, numbers_of
from tests.expert_parallel import partitioned
from tests.given_adapters import two_adapters
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 4
TARGETS = ["q_proj", "v_proj", "down_proj"]
SCALED = SGD | {"preconditioner": "scaled", "damping": 0.1, "damping_abs": 1e-3}
FROZEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a": (["a"], SGD),
    "a-scaled": (["a"], SCALED),
    "factors": (["a", "b"], SGD),
    "b-and-router": (["b", "router"], {key: value for key, value in SGD.items() if key != "lr_router"}),
}


@contextmanager
def with_gram_of_a(recipe: Recipe) -> Iterator[None]:
    """Inside the block torch's optimizers see `grad_b (a^T a + d I)^-1`."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    inject(model, recipe.adapter)
    optim, grams = recipe.optim, []
    for _, layer in adapted_layers(model):
        a_EDR = layer.experts.a.detach()
        gram_ERR = a_EDR.mT @ a_EDR
        damping_E = optim.damping * gram_ERR.diagonal(dim1=-2, dim2=-1).mean(-1) + optim.damping_abs
        grams.append(gram_ERR + damping_E[:, None, None] * torch.eye(a_EDR.shape[-1]))

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for factor, gram_ERR in zip(optimizer.param_groups[1]["params"], grams, strict=True):
            factor.grad = factor.grad @ torch.linalg.inv(gram_ERR)

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Training, dict[str, Tensor]]]:
    """For each of `FROZEN` a recipe, what plain torch makes of it, and the frozen tensors as they came."""
    folder = tmp_path_factory.mktemp("given")
    base = make_base(folder / "base")
    paths = two_adapters(base, folder, TARGETS)
    found = {}
    for name, (freeze, optim) in FROZEN.items():
        adapter = settings_of(paths, {}) | {"experts_from": paths, "router": "softmax", "top_k": None, "freeze": freeze}
        recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=WHOLE, seed=3)
        with with_gram_of_a(recipe) if name == "a-scaled" else mock.MagicMock():
            training = train_plainly(recipe)
        model = AutoModelForCausalLM.from_pretrained(base)
        inject(model, recipe.adapter)
        found[name] = recipe, training, {of.name: value.detach() for of, value in frozen_tensors(model)}
    return found


def train(job: Job, adapter: Path) -> Share:
    """Train, and write the adapter; a run that goes on reads no folder."""
    take = "dsmoelora.engine.take_experts"
    with mock.patch(take, side_effect=AssertionError("read")) if job.load_from else mock.MagicMock():
        engine = build_engine(job)
    if job.load_from:
        engine.load(job.load_from)
    last_step = job.last_step or WHOLE
    results = [engine.train_step(batches_of(job, step)) for step in range(job.first_step, last_step)]
    if job.save_to:
        engine.save(job.save_to, {"next": last_step}, keep=1)
    engine.save_adapter(adapter)
    losses, norms, lrs = zip(*((result.loss, result.grad_norm, result.lr) for result in results), strict=True)
    optimizer, loss = engine.optimizer, engine.evaluate(batches_of(job, 0))
    num_copies = optimizer.shards[0].num_copies
    return Share([*losses], [*norms], [*lrs], loss, optimizer.num_steps, numbers_of(engine), [], num_copies)


def assert_untouched(adapter: Path, frozen: dict[str, Tensor]) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    assert frozen and frozen.keys() < saved.keys()
    for name, value in frozen.items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize(
    ("name", "world_size", "ep_size", "settings"),
    [
        pytest.param("a", 1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="a-stage-0"),
        pytest.param("a", 2, 1, {"zero": {"stage": 2}}, id="a-stage-2"),
        pytest.param("b-and-router", 2, 1, {"zero": {"stage": 1}, "partitioned": False}, id="b-stage-1", marks=release),
        pytest.param("a-scaled", 2, 1, {"accumulation": 2}, id="a-scaled-stage-3"),
        pytest.param("a-scaled", 2, 2, {}, id="a-scaled-ep-size-2"),
        pytest.param("a-scaled", 4, 2, {}, id="a-scaled-four-ranks", marks=release),
        pytest.param("factors", 2, 2, {"partitioned": False}, id="factors-ep-size-2"),
        pytest.param(
            "factors", 2, 1, {"zero": {"stage3_param_persistence_threshold": 100_000}}, id="factors-kept-whole"
        ),
        pytest.param("b-and-router", 2, 1, {"zero": {"offload_param": {"device": "cpu"}}}, id="b-offloaded"),
        pytest.param("b-and-router", 4, 1, {}, id="b-four-ranks", marks=release),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory,
    references: dict[str, tuple[Recipe, Training, dict[str, Tensor]]],
    tmp_path: Path,
    name: str,
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected, frozen = references[name]
    job = Job(partitioned(recipe, ep_size), **settings)
    assert_parity(worker_pool(world_size).run(train, job, tmp_path / "adapter"), expected, 1e-5)
    assert_untouched(tmp_path / "adapter", frozen)


def counted_as_adapters(job: Job) -> list[int]:
    """The sizes of what ZeRO-3 is asked to keep whole where that is cheap."""
    with mock.patch("dsmoelora.engine.keep_whole_what_fits") as keep:
        build_engine(job)
    return sorted(keep.call_args.args[1])


def test_frozen_factors_are_kept_whole_as_trained_ones_are(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training, dict[str, Tensor]]]
) -> None:
    recipe, expected, frozen = references["factors"]
    (found,) = worker_pool(1).run(counted_as_adapters, Job(recipe))
    assert found == sorted(value.numel() for value in (*expected.weights.values(), *frozen.values()))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a-scaled", {"ep_size": 2}),
        ("factors", {"zero": {"stage3_param_persistence_threshold": 100_000}}),
        ("b-and-router", {"zero": {"stage": 2}, "partitioned": False}),
    ],
)
def test_a_run_goes_on_with_what_the_checkpoint_holds(
    worker_pool: PoolFactory,
    references: dict[str, tuple[Recipe, Training, dict[str, Tensor]]],
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
) -> None:
    """Of two ranks, in another placement; the folders' numbers are not read again."""
    recipe, expected, frozen = references[name]
    worker_pool(2).run(train, Job(recipe, last_step=HALF, save_to=tmp_path), tmp_path / "half")
    ep_size = settings.get("ep_size", 1)
    settings = {key: value for key, value in settings.items() if key != "ep_size"}
    job = Job(partitioned(recipe, ep_size), first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}", **settings)
    for share in worker_pool(2).run(train, job, tmp_path / "whole"):
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=1e-5, atol=0)
    assert_untouched(tmp_path / "whole", frozen)
