"""What one rank of a test does with the engine, and how the ranks' shares are put together again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch
from tests.conftest import PoolFactory
from tests.plain_training import BATCH_SIZE, Training, micro_batch, micro_batches

Pieces = dict[str, list[tuple[int, int, Tensor]]]


@dataclass(frozen=True)
class Job:
    """A training under ZeRO-3.

    Args:
        recipe: of one rank, see `plain_training.make_recipe`
        accumulation: micro-batches of a rank per step
        first_step, last_step: the steps [first, last) are taken, up to the recipe's last by default
        zero: more keys of `zero_optimization`
        partitioned: the weights are streamed into partitions; otherwise a whole model is handed to the engine
        rows: of each rank, where a global batch is not dealt out evenly (without accumulation)
        fillers: every micro-batch has one more row, which does not count
        load_from: checkpoint to go on from
        save_to: where a checkpoint is written after the last step
        loss_scale: by which ZeRO multiplies the loss, as it does for fp16
        start_passes: micro-batches of a rank for the gradient that experts start from; None for as many as of a step
    """

    recipe: Recipe
    accumulation: int = 1
    first_step: int = 0
    last_step: int | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    partitioned: bool = True
    rows: tuple[int, ...] = ()
    fillers: bool = False
    load_from: Path | None = None
    save_to: Path | None = None
    loss_scale: float = 1.0
    start_passes: int | None = None


@dataclass
class Share:
    """What one rank brings home.

    Args:
        numbers: for the values and every moment what this rank holds of each tensor
        num_copies: how many ranks hold the same
    """

    losses: list[float]
    grad_norms: list[float]
    lrs: list[float]
    final_loss: float
    num_optimizer_steps: int
    numbers: dict[str, Pieces]
    router_losses: list[dict[str, float]] = field(default_factory=list)
    num_copies: int = 1


def build_engine(job: Job) -> Any:
    """The engine of a job on this rank."""
    from transformers import AutoModelForCausalLM

    from dsmoelora.engine import Engine
    from dsmoelora.model import load_tokenizer
    from dsmoelora.parallel import comm

    size = BATCH_SIZE // (comm.world_size() * job.accumulation)
    train = replace(job.recipe.train, micro_batch_size=size)
    recipe = replace(job.recipe, train=train)
    # without this threshold ZeRO keeps parameters as small as ours whole, and nothing of interest happens
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10000} | job.zero
    resumes = job.load_from is not None
    if job.partitioned:
        return Engine.build(recipe, {"zero_optimization": zero}, resumes=resumes)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=recipe.model.torch_dtype)
    return Engine(recipe, {"zero_optimization": zero}, model, load_tokenizer(recipe.model), resumes=resumes)


def batches_of(job: Job, step: int) -> Any:
    """This rank's micro-batches."""
    from dsmoelora.parallel import comm

    if job.rows:
        first = sum(job.rows[: comm.rank()])
        return [micro_batch(step, slice(first, first + job.rows[comm.rank()]))]
    batches = micro_batches(step, comm.rank(), comm.world_size(), job.accumulation)
    return [_with_filler(batch) for batch in batches] if job.fillers else batches


def start_batches_of(job: Job) -> Any:
    """This rank's micro-batches for the gradient that experts start from: the first global batch."""
    return batches_of(replace(job, accumulation=job.start_passes or job.accumulation), 0)


def _with_filler(batch: MicroBatch) -> MicroBatch:
    """One more row, of a single token that is not learned."""
    row = torch.zeros_like(batch.input_ids[:1])
    mask = row.clone()
    mask[0, 0] = 1
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, row]),
        attention_mask=torch.cat([batch.attention_mask, mask]),
        labels=torch.cat([batch.labels, row - 100]),
        sequence_ids=torch.cat([batch.sequence_ids, batch.sequence_ids[:1]]),
        counts=torch.arange(len(batch.input_ids) + 1) < len(batch.input_ids),
    )


def train_on_rank(job: Job) -> Share:
    """Run a job; called on every rank."""
    engine = build_engine(job)
    if job.loss_scale != 1.0:
        engine._deepspeed.optimizer.loss_scaler.cur_scale = job.loss_scale
    if job.load_from:
        assert engine.load(job.load_from) == {"next": job.first_step}
    if engine.awaits_start:
        engine.draw_start(start_batches_of(job))
    last_step = job.last_step or job.recipe.train.max_steps
    results = [engine.train_step(batches_of(job, step)) for step in range(job.first_step, last_step)]
    assert not any(result.skipped for result in results)
    assert engine.step == last_step
    if job.save_to:
        engine.save(job.save_to, {"next": last_step}, keep=1)
    return Share(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.lr for result in results],
        engine.evaluate(batches_of(job, 0)),
        engine.optimizer.num_steps,
        numbers_of(engine),
        [result.router_losses for result in results],
        engine.optimizer.shards[0].num_copies,
    )


def numbers_of(engine: Any) -> dict[str, Pieces]:
    """Values and moments that this rank holds, by tensor and element range."""
    found: dict[str, Pieces] = {}
    for shard in engine.optimizer.shards:
        flats = {"value": shard.tensor.detach().view(-1), **engine.optimizer.state[shard.tensor]}
        for kind, flat in flats.items():
            for run in shard.segments:
                pieces = found.setdefault(kind, {}).setdefault(run.of.name, [])
                pieces.append((run.start, run.stop, flat[run.span].to("cpu", copy=True)))
    return found


def put_together(shares: list[dict[str, Pieces]], kind: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks; every element must be there, and once."""
    whole = {name: torch.full((math.prod(shape),), torch.nan) for name, shape in shapes.items()}
    for share in shares:
        for name, pieces in share.get(kind, {}).items():
            for start, stop, numbers in pieces:
                assert whole[name][start:stop].isnan().all(), f"two ranks hold {name} [{start}, {stop})"
                whole[name][start:stop] = numbers
    assert not any(tensor.isnan().any() for tensor in whole.values()), "elements that no rank holds"
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


def assert_parity(shares: list[Share], expected: Training, weight_tolerance: float) -> None:
    """Losses within 1e-5 and weights within the tolerance, on all ranks."""
    for share in shares:
        torch.testing.assert_close(share.losses, expected.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(share.grad_norms, expected.grad_norms, rtol=1e-4, atol=0)
        torch.testing.assert_close(share.lrs, expected.lrs, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=1e-5, atol=0)
        assert share.num_optimizer_steps == len(expected.losses), "one step a global batch, not one a micro-batch"
    shapes = {name: value.shape for name, value in expected.weights.items()}
    for copy in [[share] for share in shares] if shares[0].num_copies > 1 else [shares]:
        weights = put_together([share.numbers for share in copy], "value", shapes)
        for name, value in weights.items():
            error = (value - expected.weights[name]).abs().max() / expected.weights[name].abs().max()
            assert error <= weight_tolerance, f"{name} differs by {error:.1e} of its largest value"


def assert_bf16_goes_on_to_the_last_bit(worker_pool: PoolFactory, recipe: Recipe, folder: Path) -> None:
    """Two ranks that stop half way and go on have the losses of two that do not; bf16 shows any change of order."""
    recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    half = recipe.train.max_steps // 2
    worker_pool(2).run(train_on_rank, Job(recipe, last_step=half, save_to=folder))
    expected = worker_pool(2).run(train_on_rank, Job(recipe))[0]
    job = Job(recipe, first_step=half, load_from=folder / f"checkpoint-{half}")
    for share in worker_pool(2).run(train_on_rank, job):
        assert share.losses == expected.losses[half:]
        assert share.final_loss == expected.final_loss
