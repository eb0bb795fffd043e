"""`optim.flat_noise` under ZeRO: the numbers of one device with dense noise, and a base that nothing ever changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.keyed.draws import keyed_normal
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.config import Recipe
from dsmoelora.seeds import derive_seed
from tests import plain_training
from tests.conftest import PoolFactory, release
from tests.engine_ranks import Job, Share, assert_parity, batches_of, build_engine, numbers_of
from tests.expert_parallel import partitioned
from tests.plain_training import ADAMW, SGD, Training, make_base, make_recipe, train_plainly

STEPS = 6
SIGMA = 0.5
ON_HOST = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# routers that select no experts, so that no rounding decides which
METHODS: dict[str, dict[str, Any]] = {
    "one-expert": {"adapter": {"num_experts": 1, "top_k": 1, "lora_dropout": 0.1}, "optim": ADAMW},
    "mixers": {
        "adapter": {"num_experts": 4, "top_k": None, "router": "softmax", "expert": "moslora"},
        "optim": SGD,
    },
    "shared": {"adapter": {"num_experts": 3, "top_k": None, "router": "softmax", "shared_experts": 1}, "optim": SGD},
    "constant": {
        "adapter": {"num_experts": 4, "top_k": None, "router": "constant", "router_start": "sum"},
        "optim": SGD,
    },
}


def mean_gates(layer: Any, name: str) -> Tensor:
    weight = getattr(layer.router, "weight", torch.ones(1, 1))
    return {
        "one-expert": torch.ones(1),
        "mixers": torch.full((4,), 1 / 4),
        "shared": torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]),
        "constant": weight.detach().flatten(),
    }[name]


def dense_noise(layer: Any, name: str, seed: int, step: int) -> Tensor:
    """(O, D): `sigma_t ||W'_i|| / sqrt(D)` times normal numbers."""
    bank, weight_OD = layer.experts, layer.base.weight.detach()
    merged_OD = weight_OD.clone()
    for e, gate in enumerate(mean_gates(layer, name)):
        mixer = torch.eye(bank.a.shape[-1]) if bank.m is None else bank.m[e].detach()
        merged_OD += bank.scale * gate * (bank.a[e].detach() @ mixer @ bank.b[e].detach().t()).t()
    rows, width = weight_OD.shape
    sigma = SIGMA * (1 - math.cos(math.pi * step / STEPS)) / 2
    keys_1P = token_keys(seed, torch.tensor([[step]]), torch.ones(1, rows), torch.arange(rows)[None])
    normal_OD = keyed_normal(keys_1P[0], derive_seed("flat_noise", layer.name), width)
    return sigma / math.sqrt(width) * merged_OD.norm(dim=1, keepdim=True) * normal_OD


@contextmanager
def with_dense_noise(name: str) -> Iterator[None]:
    """Inside the block `train_plainly` takes its gradients with noise, and evaluates without."""
    plain, clean = plain_training.mean_loss, {}

    def mean_loss(model: Any, step: int, seed: int, *more: Any) -> Tensor:
        if model.training:
            for _, layer in adapted_layers(model):
                clean[layer.base] = layer.base.weight.detach().clone()
                layer.base.weight.data += dense_noise(layer, name, seed, step)
        return plain(model, step, seed, *more)

    def restore(*_: Any) -> None:
        for base, weight in clean.items():
            base.weight.data.copy_(weight)

    hook = register_optimizer_step_pre_hook(restore)
    try:
        with mock.patch.object(plain_training, "mean_loss", mean_loss):
            yield
    finally:
        hook.remove()


def recipe_of(base: Path, name: str, sigma: float = SIGMA) -> Recipe:
    method = METHODS[name]
    optim = method["optim"] | {"flat_noise": sigma}
    return make_recipe(base, adapter=method["adapter"], optim=optim, max_steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def references(base: Path) -> dict[str, tuple[Recipe, Training]]:
    found = {}
    for name in METHODS:
        recipe = recipe_of(base, name)
        with with_dense_noise(name):
            found[name] = recipe, train_plainly(recipe)
    return found


@dataclass(frozen=True)
class Found:
    """A rank's share, and whether its base was the file's after every step."""

    share: Share
    is_clean: list[bool]


def is_clean(engine: Any, path: str, gathers: bool = True) -> bool:
    """Whether every weight of the base is the file's to the last bit, where it lies and, if wanted, gathered."""
    from dsmoelora.parallel import zero

    files = AutoModelForCausalLM.from_pretrained(path, dtype=engine.recipe.model.torch_dtype).state_dict()
    same = True
    for name, parameter in engine.model.named_parameters():
        if name.replace(".base.", ".") in files:
            expected = files[name.replace(".base.", ".")].flatten()
            piece, start = zero.held_piece(parameter)
            held = expected[start : start + len(piece)]
            same &= torch.equal(piece[: len(held)].cpu(), held)
            if gathers:
                with zero.gathered([parameter]):
                    same &= torch.equal(parameter.detach().flatten().cpu(), expected)
    return same


def train(job: Job) -> Found:
    engine = build_engine(job)
    if job.load_from:
        engine.load(job.load_from)
    results, clean = [], []
    for step in range(job.first_step, job.last_step or STEPS):
        results.append(engine.train_step(batches_of(job, step)))
        clean.append(is_clean(engine, job.recipe.model.path))
    if job.save_to:
        engine.save(job.save_to, {}, keep=1)
    losses, norms, lrs = zip(*((result.loss, result.grad_norm, result.lr) for result in results), strict=True)
    optimizer, loss = engine.optimizer, engine.evaluate(batches_of(job, 0))
    copies = optimizer.shards[0].num_copies
    share = Share([*losses], [*norms], [*lrs], loss, optimizer.num_steps, numbers_of(engine), [], copies)
    return Found(share, clean)


@pytest.mark.parametrize(
    ("name", "world_size", "ep_size", "settings"),
    [
        pytest.param("mixers", 1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0"),
        pytest.param("constant", 1, 1, {}, id="one-rank"),
        pytest.param("shared", 2, 1, {"zero": {"stage": 2}, "partitioned": False}, id="stage-2"),
        pytest.param("one-expert", 2, 1, {"zero": {"stage": 1}, "partitioned": False}, id="stage-1", marks=release),
        pytest.param("mixers", 2, 1, {"accumulation": 2}, id="stage-3"),
        pytest.param("mixers", 2, 2, {}, id="ep-size-2"),
        pytest.param("constant", 2, 1, {"zero": ON_HOST}, id="offloaded"),
        pytest.param("one-expert", 2, 1, {"zero": {"stage3_param_persistence_threshold": 100_000}}, id="kept-whole"),
        pytest.param("one-expert", 4, 1, {}, id="four-ranks"),
        pytest.param("mixers", 4, 2, {}, id="ep-size-2-of-four", marks=release),
    ],
)
def test_parity_with_dense_noise(
    worker_pool: PoolFactory,
    references: dict[str, tuple[Recipe, Training]],
    name: str,
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = references[name]
    found = worker_pool(world_size).run(train, Job(partitioned(recipe, ep_size), **settings))
    assert all(all(each.is_clean) for each in found)
    assert_parity([each.share for each in found], expected, 1e-4)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]], tmp_path: Path
) -> None:
    recipe, expected = references["mixers"]
    worker_pool(2).run(train, Job(recipe, last_step=3, save_to=tmp_path))
    job = Job(recipe, first_step=3, load_from=tmp_path / "checkpoint-3")
    found = worker_pool(1).run(train, job)[0]
    assert all(found.is_clean)
    torch.testing.assert_close(found.share.losses, expected.losses[3:], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.share.final_loss, expected.final_loss, rtol=1e-5, atol=0)


def test_noise_changes_what_is_learned_and_sigma_0_is_the_run_without(base: Path, worker_pool: PoolFactory) -> None:
    """Without the key nothing is put aside; the first step, at the foot of the ramp, is the same to the last bit."""
    noisy, none = (worker_pool(2).run(train, Job(recipe_of(base, "mixers", sigma)))[0].share for sigma in (SIGMA, 0.0))
    without = make_recipe(base, **METHODS["mixers"], max_steps=STEPS, seed=3)
    plain = worker_pool(2).run(train, Job(without))[0].share
    assert noisy.losses[0] == none.losses[0] and noisy.losses[1] != none.losses[1]
    assert none.losses == plain.losses and none.final_loss == plain.final_loss
    for kind, tensors in plain.numbers.items():
        for name, pieces in tensors.items():
            for mine, other in zip(none.numbers[kind][name], pieces, strict=True):
                assert torch.equal(mine[2], other[2])


def step_that_ends_early(job: Job, error: str) -> tuple[str, bool]:
    """How the third step ended, and whether the base was clean after it."""
    from dsmoelora.parallel.stopping import Stopped

    engine = build_engine(job)
    for step in range(2):
        engine.train_step(batches_of(job, step))
    calls, layers = [], [layer for _, layer in adapted_layers(engine.model)]

    def end(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise {"stop": Stopped, "error": RuntimeError}[error]("enough")

    place = engine.model if error == "stop" else layers[-1]
    place.register_forward_pre_hook(end, prepend=True)  # as the engine's own, before ZeRO has begun to gather
    try:
        engine.train_step(batches_of(job, 2))
    except (Stopped, RuntimeError) as found:
        return type(found).__name__, is_clean(engine, job.recipe.model.path, gathers=error == "stop")
    return "nothing", False


@pytest.mark.parametrize(("error", "name"), [("stop", "Stopped"), ("error", "RuntimeError")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_ends_early_leaves_the_base_clean(
    base: Path, worker_pool: PoolFactory, error: str, name: str, dtype: Any
) -> None:
    recipe = recipe_of(base, "mixers")
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))
    found = worker_pool(2).run(step_that_ends_early, Job(recipe, accumulation=2), error)
    assert found == [(name, True)] * 2
