"""One router a feed-forward block and plain LoRA beside it learn under ZeRO-3 what they learn in plain torch code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.adapters import adapter_context
from dsmoelora.config import LossesConfig, ParallelConfig, Recipe
from dsmoelora.data.chat import Prompt
from tests.conftest import PoolFactory, thorough
from tests.engine_ranks import Job, Share, assert_parity, batches_of, build_engine, put_together, train_on_rank
from tests.plain_training import ADAMW, SGD, Training, make_base, make_recipe, preconditioned, train_plainly

NUM_STEPS, HALF = 6, 3
BLOCK = {
    "style": "ffn_block",
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
    "lora_modules": ["q_proj", "v_proj"],
    "num_experts": 6,
    "lora_dropout": 0.1,
}
# much more than usual, so that they decide what is learned
LOSSES = LossesConfig(balance=2.0, z=0.1)
CONTRASTIVE = LossesConfig(contrastive=0.3, contrastive_coactive=0.2, contrastive_temperature=0.5, contrastive_tokens=4)
TANGENT = SGD | {"preconditioner": "tangent", "damping": 0.1, "damping_abs": 1e-3, "max_grad_norm_router": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"adapter": BLOCK, "optim": ADAMW},
    "tangent": {"adapter": BLOCK | {"expert": "moslora"}, "optim": TANGENT},
    "contrastive": {"adapter": BLOCK | {"init": "svd"}, "optim": ADAMW, "seed": 6},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plainly(base: Path) -> dict[str, tuple[Recipe, Training]]:
    """By method, a recipe and what plain torch makes of it."""
    found = {}
    for method, settings in METHODS.items():
        losses = CONTRASTIVE if method == "contrastive" else LOSSES
        recipe = replace(make_recipe(base, max_steps=NUM_STEPS, **settings), losses=losses)
        if method == "tangent":
            with preconditioned(recipe.optim, []):
                found[method] = recipe, train_plainly(recipe)
        else:
            found[method] = recipe, train_plainly(recipe)
    return found


def tolerance(method: str) -> float:
    return 1e-5 if method == "tangent" else 1e-4  # Adam makes steps of rounding noise


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_learns_with_one_router_and_feels_its_losses(
    plainly: dict[str, tuple[Recipe, Training]], method: str
) -> None:
    recipe, expected = plainly[method]
    assert expected.smallest_gap > 1e-4
    assert expected.final_loss < 0.99 * expected.losses[0]
    assert [name for name in expected.weights if "router" in name] == ["model.layers.0.mlp.router.weight"]
    assert expected.weights["model.layers.0.self_attn.q_proj.experts.a"].shape[0] == 1
    if method != "tangent":
        without = train_plainly(replace(recipe, losses=LossesConfig()))
        assert abs(without.final_loss - expected.final_loss) > 1e-4


class Case(NamedTuple):
    """One training; with ep_size 1 no tokens travel and the exchange means nothing."""

    method: str
    world_size: int
    ep_size: int = 1
    accumulation: int = 1
    recompute: bool = False
    exchange: Any = "auto"
    stage: int = 3


CASES = [
    Case("adamw", 1),
    Case("adamw", 3, accumulation=2, recompute=True),
    Case("adamw", 2, ep_size=2, recompute=True, exchange="all_to_all"),
    Case("adamw", 2, stage=0),
    Case("contrastive", 3),
    Case("contrastive", 2, ep_size=2, recompute=True),
    Case("tangent", 2, accumulation=2),
    Case("tangent", 2, stage=2),
    Case("tangent", 4, ep_size=2, recompute=True, exchange="gather"),
    Case("tangent", 4, ep_size=2, accumulation=2, exchange="all_to_all"),
]


# Each method on each kind of placement at each commit.
LATER = [CASES[0], CASES[4], CASES[7], CASES[8]]


@pytest.mark.parametrize("case", [thorough(case) if case in LATER else case for case in CASES], ids=str)
def test_ranks_accumulation_recomputation_and_placement_change_nothing(
    worker_pool: PoolFactory, plainly: dict[str, tuple[Recipe, Training]], case: Case
) -> None:
    recipe, expected = plainly[case.method]
    train = replace(recipe.train, activation_checkpointing=case.recompute)
    parallel = ParallelConfig(case.ep_size, case.exchange)
    job = Job(replace(recipe, train=train, parallel=parallel), case.accumulation, zero={"stage": case.stage})
    shares = worker_pool(case.world_size).run(train_on_rank, job)
    assert_parity(shares, expected, tolerance(case.method))
    for share in shares:
        for found, wanted in zip(share.router_losses, expected.router_losses, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), "counted once a block, not once a layer"


@pytest.mark.parametrize("options", [{"router": "sigmoid_bias", "bias_rate": 0.05}, {"router": "prompt"}], ids=str)
def test_routers_with_a_memory_serve_blocks_too(worker_pool: PoolFactory, base: Path, options: dict[str, Any]) -> None:
    recipe = make_recipe(base, adapter=BLOCK | options, optim=SGD, max_steps=NUM_STEPS)
    expected = train_plainly(recipe)
    for world_size, ep_size in [(3, 1), (2, 2)]:
        job = Job(replace(recipe, parallel=ParallelConfig(ep_size)))
        assert_parity(worker_pool(world_size).run(train_on_rank, job), expected, 1e-5)


def fallbacks_on_rank(job: Job) -> float:
    """How many matrices Cholesky could not take in the first step."""
    fallbacks: float = build_engine(job).train_step(batches_of(job, 0)).preconditioning["eigh_fallbacks"]
    return fallbacks


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 1), (4, 2)])
def test_a_matrix_that_several_ranks_hold_is_reported_once(
    worker_pool: PoolFactory, base: Path, world_size: int, ep_size: int
) -> None:
    """Every `b` starts at zero, and so does its undamped Gram matrix: 3 layers of 6 experts, and 2 of one."""
    optim = TANGENT | {"preconditioner": "scaled", "damping": 0.0, "damping_abs": 0.0}
    recipe = make_recipe(base, adapter=BLOCK, optim=optim)
    job = Job(replace(recipe, parallel=ParallelConfig(ep_size)))
    assert worker_pool(world_size).run(fallbacks_on_rank, job) == [20.0] * world_size


@dataclass
class Finished:
    """What a rank tells after loading, saving the adapter and going on to the end."""

    share: Share
    loss: float
    answers: list[str]


def finish_on_rank(job: Job, folder: Path) -> Finished:
    engine = build_engine(job)
    assert job.load_from is not None
    engine.load(job.load_from)
    engine.save_adapter(folder)
    loss = engine.evaluate(batches_of(job, 0))
    answers = engine.generate([Prompt([{"role": "user", "content": "ab"}])], max_new_tokens=8)
    return Finished(train_on_rank(job), loss, answers)


@pytest.mark.parametrize(("world_size", "ep_size"), [(3, 3), (1, 1)])
def test_a_run_goes_on_and_its_adapter_loads_under_another_layout(
    worker_pool: PoolFactory,
    plainly: dict[str, tuple[Recipe, Training]],
    base: Path,
    tmp_path: Path,
    world_size: int,
    ep_size: int,
) -> None:
    recipe, expected = plainly["adamw"]
    job = Job(replace(recipe, parallel=ParallelConfig(2)))
    first_half = worker_pool(4).run(train_on_rank, replace(job, last_step=HALF, save_to=tmp_path))
    load_from = tmp_path / f"checkpoint-{HALF}"
    job = Job(replace(recipe, parallel=ParallelConfig(ep_size)), first_step=HALF, load_from=load_from)
    finished = worker_pool(world_size).run(finish_on_rank, job, tmp_path / "adapter")
    for rank in finished:
        assert rank.share.losses == pytest.approx(expected.losses[HALF:], rel=1e-5)
        assert rank.share.final_loss == pytest.approx(expected.final_loss, rel=1e-5)
        assert rank.loss == pytest.approx(first_half[0].final_loss, rel=1e-5)

    shapes = {name: value.shape for name, value in expected.weights.items()}
    written = put_together([share.numbers for share in first_half], "value", shapes)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors.items())
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert adapter_context(model).exchange is None
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(found[name], value) for name, value in written.items())
    assert len({rank.answers[0] for rank in finished}) == 1
