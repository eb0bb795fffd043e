"""fp16 with loss scaling, on accelerators that know it: losses, steps that overflow, and the scale after a resume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, Pieces, batches_of, build_engine, numbers_of, put_together
from tests.plain_training import ADAMW, SGD, make_base, make_recipe, train_plainly

pytestmark = pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="the accelerator has no fp16")

NUM_STEPS = 6
FULL = 2.0**16  # DeepSpeed's first scale; the first overflow leaves it as it is, every further one halves it
SMALL = 2.0**10  # can double in every step and overflow in none


@dataclass
class Told:
    """What a rank tells: of every step, and the adapter's numbers before the first step and after each."""

    losses: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    numbers: list[dict[str, Pieces]] = field(default_factory=list)


def train_with_overflows(job: Job, bad_steps: tuple[int, ...]) -> Told:
    """Train; in these steps the gradient is too large for fp16 on the last rank, and there alone."""
    from dsmoelora.parallel import comm, loss_scale

    engine = build_engine(job)
    if job.load_from:
        engine.load(job.load_from)
    told = Told(numbers=[numbers_of(engine)])

    def overflow(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad and engine.step in bad_steps and comm.rank() == comm.world_size() - 1:
            output.register_hook(lambda grad: grad * torch.finfo(torch.float16).max)

    engine.model.get_submodule("model.layers.0.mlp").register_forward_hook(overflow)
    for step in range(job.first_step, job.last_step or NUM_STEPS):
        result = engine.train_step(batches_of(job, step))
        told.losses.append(result.loss)
        told.skipped.append(result.skipped)
        told.scales.append(loss_scale.of(engine._deepspeed))
        told.numbers.append(numbers_of(engine))
    if job.save_to:
        engine.save(job.save_to, {}, keep=1)
    return told


def same(one: dict[str, Pieces], other: dict[str, Pieces]) -> bool:
    pieces = [(name, *piece) for kind in one for name in one[kind] for piece in one[kind][name]]
    others = [(name, *piece) for kind in other for name in other[kind] for piece in other[kind][name]]
    return all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(pieces, others, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def recipe(base: Path) -> Recipe:
    return in_dtype(make_recipe(base, adapter={}, optim=ADAMW, max_steps=NUM_STEPS, seed=33), "fp16")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("preconditioner", ["none", "scaled"])
def test_losses_stay_close_to_fp32(worker_pool: PoolFactory, recipe: Recipe, stage: int, preconditioner: Any) -> None:
    """fp16 has 11 bits: a loss of rounded products is right to about 1e-3; the reference is plain torch in fp32."""
    job = Job(recipe, 2, zero={"stage": stage}, partitioned=stage == 3)
    if preconditioner == "scaled":
        job = replace(job, recipe=replace(recipe, optim=replace(recipe.optim, preconditioner="scaled")))
        job_in_fp32 = replace(job, recipe=in_dtype(job.recipe, "fp32"))
        reference = worker_pool(2).run(train_with_overflows, job_in_fp32, ())[0].losses
    else:
        reference = train_plainly(recipe).losses
    for told in worker_pool(2).run(train_with_overflows, job, ()):
        assert told.skipped == [False] * NUM_STEPS and told.scales == [FULL] * NUM_STEPS
        torch.testing.assert_close(told.losses, reference, rtol=2e-3, atol=0)
        assert told.losses != reference, "nothing was computed in fp16"


def in_dtype(recipe: Recipe, dtype: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, dtype=dtype))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_skip_what_overflows_on_one_and_lower_the_scale(
    worker_pool: PoolFactory, recipe: Recipe, stage: int, on_host: bool
) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}} if on_host else {}
    job = Job(recipe, 2, zero={"stage": stage} | offload, partitioned=stage == 3)
    for told in worker_pool(2).run(train_with_overflows, job, (1, 3)):
        assert told.skipped == [False, True, False, True, False, False]
        assert told.scales == [FULL, FULL, FULL, FULL / 2, FULL / 2, FULL / 2]
        moved = [not same(*pair) for pair in zip(told.numbers, told.numbers[1:], strict=False)]
        assert moved == [not skipped for skipped in told.skipped]
        assert torch.tensor(told.losses).isfinite().all()


def train_while_the_scale_grows(job: Job) -> tuple[Told, list[float]]:
    """Train with a scale that doubles in every step but the first; also the norms of the gradients."""
    from dsmoelora.parallel import loss_scale

    engine = build_engine(job)
    scaler = engine._deepspeed.optimizer.loss_scaler
    scaler.cur_scale, scaler.scale_window = SMALL, 1
    told, norms = Told(), []
    for step in range(NUM_STEPS):
        result = engine.train_step(batches_of(job, step))
        told.losses.append(result.loss)
        told.scales.append(loss_scale.of(engine._deepspeed))
        norms.append(result.grad_norm)
    told.numbers.append(numbers_of(engine))
    return told, norms


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_raises_the_scale_is_as_long_as_any(worker_pool: PoolFactory, base: Path, stage: int) -> None:
    """Plain SGD without clipping moves by the gradient itself: one that is halved shows in the weights."""
    recipe = make_recipe(base, adapter={}, optim=SGD | {"momentum": 0.0}, max_steps=NUM_STEPS, seed=33)
    expected = train_plainly(recipe)
    job = Job(in_dtype(recipe, "fp16"), zero={"stage": stage}, partitioned=stage == 3)
    ranks = worker_pool(2).run(train_while_the_scale_grows, job)
    for told, norms in ranks:
        assert told.scales == [SMALL * 2**step for step in range(NUM_STEPS)]
        torch.testing.assert_close(told.losses, expected.losses, rtol=2e-3, atol=0)
        torch.testing.assert_close(norms, expected.grad_norms, rtol=1e-2, atol=0)
    shapes = {name: value.shape for name, value in expected.weights.items()}
    for name, value in put_together([told.numbers[-1] for told, _ in ranks], "value", shapes).items():
        if name.endswith("experts.b"):  # it started at 0, and goes so far that fp16 rounds little of it
            error = (value - expected.weights[name]).norm() / expected.weights[name].norm()
            assert error < 0.02, f"{name} differs by {error:.2f} of the way it went"


def test_a_resumed_run_goes_on_with_the_scale(worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path) -> None:
    """The overflow before the checkpoint counts: the one after it halves the scale."""
    straight = worker_pool(2).run(train_with_overflows, Job(recipe), (1, 3))
    worker_pool(2).run(train_with_overflows, Job(recipe, last_step=3, save_to=tmp_path), (1,))
    resumed = worker_pool(2).run(
        train_with_overflows, Job(recipe, first_step=3, load_from=tmp_path / "checkpoint-3"), (3,)
    )
    for one, other in zip(straight, resumed, strict=True):
        assert other.losses == one.losses[3:]
        assert other.scales == one.scales[3:] == [FULL / 2] * 3
        assert same(other.numbers[-1], one.numbers[-1])
