"""Every kind of expert under ZeRO-3 learns what it learns on one device, whatever ranks, accumulation and placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.conftest import PoolFactory, thorough
from tests.engine_ranks import Job, assert_parity, batches_of, build_engine, train_on_rank
from tests.expert_parallel import DAMPED, on_one_device, partitioned
from tests.plain_training import ADAMW, SGD, Training, global_batch, make_base, make_recipe

NUM_STEPS, HALF = 6, 3
METHODS: dict[str, dict[str, Any]] = {
    "moslora": {
        "adapter": {"expert": "moslora", "mixer_init": "orthogonal", "gate_power": 0.5, "lora_dropout": 0.1},
        "optim": ADAMW,
    },
    "moslora-scaled": {
        "adapter": {"expert": "moslora", "lora_dropout": 0.1},
        "optim": SGD | DAMPED | {"preconditioner": "scaled"},
    },
    "moslora-tangent": {
        "adapter": {"expert": "moslora", "mixer_init": "orthogonal"},
        "optim": SGD | DAMPED | {"preconditioner": "tangent"},
    },
    "dora": {"adapter": {"expert": "dora", "gate_power": 0.5, "lora_dropout": 0.1}, "optim": ADAMW},
    "shared": {"adapter": {"shared_experts": 2, "lora_dropout": 0.1, "gate_power": 0.5}, "optim": ADAMW},
    "shared-tangent": {"adapter": {"shared_experts": 1}, "optim": SGD | DAMPED | {"preconditioner": "tangent"}},
    "dora-scaled": {"adapter": {"expert": "dora"}, "optim": SGD | DAMPED | {"preconditioner": "scaled"}},
}


@dataclass
class Reference:
    """What one device makes of a method, in which every token uses every expert."""

    recipe: Recipe
    training: Training

    @property
    def tolerance(self) -> float:
        """On weights; Adam turns rounding noise in tiny gradients into steps of the size of the learning rate."""
        return 1e-4 if self.recipe.optim.name == "adamw" else 1e-5


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """`plainly(method)` is trained once a session."""
    base = make_base(tmp_path_factory.mktemp("base"))

    @cache
    def get(method: str) -> Reference:
        settings = METHODS[method]
        adapter = {"router": "softmax", "top_k": None, "num_experts": 6} | settings["adapter"]
        recipe = make_recipe(base, adapter=adapter, optim=settings["optim"], max_steps=NUM_STEPS)
        return Reference(recipe, on_one_device(recipe)[0])

    return get


Plainly = Callable[[str], Reference]


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_learns(plainly: Plainly, method: str) -> None:
    """What the comparisons below rest on."""
    training = plainly(method).training
    assert training.final_loss < 0.98 * training.losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_stage_0_changes_nothing(worker_pool: PoolFactory, plainly: Plainly, method: str) -> None:
    expected = plainly(method)
    shares = worker_pool(2).run(train_on_rank, Job(expected.recipe, zero={"stage": 0}))
    assert_parity(shares, expected.training, expected.tolerance)


@pytest.mark.parametrize(
    ("method", "world_size", "ep_size", "exchange"),
    [
        *((method, 2, 2, "gather") for method in METHODS if "shared" not in method),
        *((method, 2, 1, "auto") for method in METHODS if "shared" in method),
        *(thorough(method, 4, 1, "auto") for method in METHODS),
        *((method, 4, 2, "all_to_all") for method in ("moslora-scaled", "dora-scaled")),
    ],
)
def test_ranks_accumulation_and_placement_change_nothing(
    worker_pool: PoolFactory, plainly: Plainly, method: str, world_size: int, ep_size: int, exchange: Any
) -> None:
    expected = plainly(method)
    recipe = partitioned(expected.recipe, ep_size, exchange)
    recipe = replace(recipe, train=replace(recipe.train, activation_checkpointing=world_size == 4))
    shares = worker_pool(world_size).run(train_on_rank, Job(recipe, accumulation=2))
    assert_parity(shares, expected.training, expected.tolerance)


@pytest.mark.parametrize("method", ["moslora-tangent", "dora-scaled"])
def test_another_layout_goes_on_as_if_nothing_had_happened(
    worker_pool: PoolFactory, plainly: Plainly, tmp_path: Path, method: str
) -> None:
    expected = plainly(method)
    job = Job(partitioned(expected.recipe, 2), last_step=HALF, save_to=tmp_path)
    worker_pool(4).run(train_on_rank, job)
    job = Job(expected.recipe, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    shares = worker_pool(2).run(train_on_rank, job)
    later = {key: getattr(expected.training, key)[HALF:] for key in ("losses", "grad_norms", "lrs")}
    for share in shares:
        assert share.num_optimizer_steps == NUM_STEPS
        share.num_optimizer_steps = NUM_STEPS - HALF
    assert_parity(shares, replace(expected.training, **later), expected.tolerance)


def speak_and_save(job: Job, folder: Path) -> tuple[Tensor, list[float], list[str]]:
    """Logits, losses and an answer of a model under ZeRO-3 whose adapter is saved."""
    engine = build_engine(job)
    losses = [engine.train_step(batches_of(job, step)).loss for step in range(NUM_STEPS)]
    engine.save_adapter(folder)
    answers = engine.generate([Prompt([{"role": "user", "content": "ab"}])], max_new_tokens=8)
    engine.model.eval()
    with torch.no_grad():
        return engine.model(global_batch(0)[0]).logits.float(), losses, answers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["moslora-scaled", "dora", "shared"])
def test_an_adapter_says_the_same_without_deepspeed(
    worker_pool: PoolFactory, plainly: Plainly, tmp_path: Path, method: str, dtype: Any
) -> None:
    recipe, expected = plainly(method).recipe, plainly(method).training
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))
    folder = tmp_path / "adapter"
    recipe = partitioned(recipe, 1 if recipe.adapter.shared_experts else 2)
    ranks = worker_pool(2).run(speak_and_save, Job(recipe), folder)
    plain = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=recipe.model.torch_dtype)
    ids_BS = global_batch(0)[0]
    with torch.no_grad():
        of_base = plain(ids_BS).logits.float()
        logits = load_adapter(plain, folder)(ids_BS).logits.float()
    assert (logits - of_base).norm() > 0.05 * of_base.norm(), "it has learned something"
    for found, losses, answers in ranks:
        assert (found - logits).norm() <= (1e-5 if dtype == "fp32" else 2e-2) * logits.norm()
        torch.testing.assert_close(losses, expected.losses, rtol=1e-5 if dtype == "fp32" else 0.02, atol=0)
        assert answers == ranks[0][2] and answers != [""]
