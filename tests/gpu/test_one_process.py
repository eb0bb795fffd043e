"""The engine on one GPU, with NCCL and a world of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.adapters.given import settings_of
from dsmoelora.config import Recipe
from dsmoelora.config.adapter_options import EXPERTS, ROUTERS
from tests.conftest import PoolFactory
from tests.distributed.test_matrix import OPTIMIZERS, recipe_of
from tests.engine_ranks import Job, train_on_rank
from tests.given_adapters import peft_adapter
from tests.gpu_engine import (
    accumulate_without_a_wait,
    answers,
    assert_healthy,
    first_half,
    grows,
    learn,
    peaks_of_steps,
    save_half_way,
    waits_of_a_step,
)
from tests.helpers_distributed import WorkerPool
from tests.plain_training import METHODS, SGD, make_base, make_recipe

TIMEOUT_S = 600.0
NUM_DOCUMENTED_WAITS = 2  # the step's own sums, and the norm of the gradient that ZeRO clips by


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    gpu = WorkerPool(1, env={"DS_ACCELERATOR": "cuda"}, forked=False)
    yield gpu
    gpu.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def recipe(base: Path) -> Recipe:
    return make_recipe(base, **METHODS["adamw-short"])


@pytest.mark.parametrize("router", [name for name, kind in ROUTERS.items() if kind.is_trained])
def test_every_expert_with_every_router_and_preconditioner(pool: WorkerPool, base: Path, router: str) -> None:
    recipes = [
        recipe_of(base, expert=expert, router=router, preconditioner=rule, init="kaiming", style="per_linear")
        for expert, rule in product(EXPERTS, OPTIMIZERS)
    ]
    assert_healthy(pool.run(learn, recipes, timeout_s=TIMEOUT_S)[0], "cuda")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp32_is_that_of_a_cpu(pool: WorkerPool, worker_pool: PoolFactory, recipe: Recipe, accumulation: int) -> None:
    (found,), (expected,) = (one.run(train_on_rank, Job(recipe, accumulation)) for one in (pool, worker_pool(1)))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.final_loss, expected.final_loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_experts_start_from_the_gradient_as_on_a_cpu(
    pool: WorkerPool, worker_pool: PoolFactory, base: Path, dtype: Any
) -> None:
    """In fp16 after a search for a loss scale."""
    adapter = {"init": "gradient", "num_experts": 4, "top_k": 4}
    recipe = make_recipe(base, adapter=adapter, optim=SGD, max_steps=4)
    (expected,) = worker_pool(1).run(train_on_rank, Job(recipe))
    (found,) = pool.run(train_on_rank, Job(replace(recipe, model=replace(recipe.model, dtype=dtype))))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4 if dtype == "fp32" else 0.02, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "softmax", "freeze": ["a"]},
        {"router": "constant", "router_start": "sum"},
        {"router": "arrow", "top_k": 2},  # all of them: rounding chooses nothing
        {"router": "softmax", "split_ranks": True},
    ],
    ids=str,
)
def test_experts_that_start_from_adapters_are_those_of_a_cpu(
    pool: WorkerPool, worker_pool: PoolFactory, base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Of other ranks and scales, one of them without a layer; with a frozen factor whose Gram matrix is wanted."""
    targets = ["q_proj", "v_proj", "down_proj"]
    paths = [
        str(peft_adapter(base, tmp_path / "one", r=2, target_modules=targets[:2])),
        str(peft_adapter(base, tmp_path / "two", r=3, lora_alpha=12, target_modules=targets)),
    ]
    adapter = settings_of(paths, settings) | {"experts_from": paths, "top_k": None} | settings
    optim = {"lr": 1e-2, "preconditioner": "scaled", "damping": 0.1}
    recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=4)
    (found,), (expected,) = (one.run(train_on_rank, Job(recipe)) for one in (pool, worker_pool(1)))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.final_loss, expected.final_loss, rtol=1e-3, atol=0)


def test_bf16_stays_within_two_percent_of_fp32(pool: WorkerPool, recipe: Recipe) -> None:
    half = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    (found,), (expected,) = (pool.run(train_on_rank, Job(one)) for one in (half, recipe))
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)


def test_a_checkpoint_goes_on_on_the_gpu_and_on_a_cpu(
    pool: WorkerPool, worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path
) -> None:
    (whole,) = pool.run(train_on_rank, Job(recipe))
    pool.run(train_on_rank, first_half(recipe, tmp_path))
    job = save_half_way(recipe, tmp_path)
    for one in (pool, worker_pool(1)):
        (found,) = one.run(train_on_rank, job)
        torch.testing.assert_close(found.losses, whole.losses[job.first_step :], rtol=1e-4, atol=0)


def test_answers(pool: WorkerPool, recipe: Recipe) -> None:
    assert len(pool.run(answers, recipe)[0]) == 2


def test_the_host_waits_nowhere_in_forward_and_backward(pool: WorkerPool, recipe: Recipe) -> None:
    pool.run(accumulate_without_a_wait, recipe)


def test_the_host_waits_twice_a_step(pool: WorkerPool, recipe: Recipe) -> None:
    assert pool.run(waits_of_a_step, recipe)[0] <= NUM_DOCUMENTED_WAITS


def test_a_step_leaves_no_memory_behind(pool: WorkerPool, recipe: Recipe) -> None:
    peaks = pool.run(peaks_of_steps, recipe, 10)[0]
    assert min(peaks) > 0 and not grows(peaks)


def test_memory_is_that_of_the_checkpointed_activations(pool: WorkerPool, recipe: Recipe) -> None:
    thrifty = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    kept, recomputed = (max(pool.run(peaks_of_steps, one, 4)[0]) for one in (recipe, thrifty))
    assert recomputed <= 1.05 * kept


def test_the_layer_compiles_to_what_it_is_eagerly() -> None:
    """The engine compiles nothing; a model that a user compiles must have the same outputs and gradients."""
    from tests.placement import adapted_linear

    eager, x_TD = adapted_linear("lora", "softmax_topk", "cuda")
    compiled = torch.compile(eager, fullgraph=False)
    outputs = []
    for model in (eager, compiled):
        eager.zero_grad()
        y_TO = model(x_TD)
        y_TO.square().sum().backward()
        outputs.append([y_TO, *(one.grad.clone() for one in eager.parameters() if one.grad is not None)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
