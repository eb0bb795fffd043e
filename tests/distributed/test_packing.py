"""Packed rows through the engine: the losses, gradients and adapters of the same samples in rows of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmoelora.config import LossesConfig, Recipe
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.packing import pack
from tests.conftest import PoolFactory, thorough
from tests.engine_ranks import numbers_of, put_together
from tests.helpers import tiny_llama
from tests.plain_training import make_recipe

NUM_SAMPLES, CAPACITY, NUM_STEPS = 60, 24, 4
BATCH_SIZE, MICRO_BATCH_SIZE = 8, 2


class Samples:
    """Random tokens of 2 to 20 a sample, as the loader wants a dataset; about half of them are learned."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.num_tokens = rng.integers(2, 21, NUM_SAMPLES)
        self._tokens = [rng.integers(4, 200, count).tolist() for count in self.num_tokens]
        learned = [[False, True, *(rng.random(count - 2) < 0.5)] for count in self.num_tokens]
        self._labels = [
            [token if flag else -100 for token, flag in zip(tokens, flags, strict=True)]
            for tokens, flags in zip(self._tokens, learned, strict=True)
        ]
        self.num_supervised = np.array([sum(flags) for flags in learned])
        self.mixture = Mixture([NUM_SAMPLES])

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        return self._tokens[index], self._labels[index]


@dataclass(frozen=True)
class Job:
    """A training on packed rows, or on the same samples in rows of their own."""

    recipe: Recipe
    packed: bool


@dataclass
class Outcome:
    """What a rank saw, and what it holds."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_columns: int = 0
    eval_loss: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    contrastive: list[float] = field(default_factory=list)


def unpacked(batch: Any) -> Any:
    """Every sample of a packed micro-batch in a row of its own, under its sequence id."""
    from dsmoelora.data import MicroBatch

    real_BS = batch.attention_mask == 1
    sequences = batch.sequence_ids[real_BS].unique()
    places = [real_BS & (batch.sequence_ids == sequence) for sequence in sequences]
    shape = (len(places), max(int(here.sum()) for here in places))
    ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, -100)
    for i, here in enumerate(places):
        length = int(here.sum())
        ids[i, :length], mask[i, :length], labels[i, :length] = batch.input_ids[here], 1, batch.labels[here]
    return MicroBatch(ids, mask, labels, sequences, batch.num_supervised_global, batch.num_tokens_global)


def train_on_rank(job: Job) -> Outcome:
    """Run a job; called on every rank."""
    from dsmoelora.data import train_steps
    from dsmoelora.engine import Engine
    from dsmoelora.parallel import comm

    samples: Any = Samples()
    layout = {"rank": comm.rank(), "world_size": comm.world_size(), "pad_token_id": 0}
    sizes = {"batch_size": BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE}
    packing = pack(samples.num_tokens, CAPACITY, seed=1)
    steps = list(islice(train_steps(samples, seed=1, packing=packing, **sizes, **layout), NUM_STEPS))
    if not job.packed:
        steps = [[unpacked(batch) for batch in step] for step in steps]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10000}
    engine = Engine.build(job.recipe, {"zero_optimization": zero})
    if job.packed:
        engine.check_packing()
    outcome = Outcome()
    for step in steps:
        result = engine.train_step(step)
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
        outcome.num_tokens.append(result.num_tokens)
        outcome.contrastive += result.router_losses.values()
        outcome.num_columns += sum(batch.input_ids.numel() for batch in step)
    outcome.eval_loss = engine.evaluate(steps[0])
    outcome.numbers = numbers_of(engine)
    return outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.15}
    return tiny_llama(tmp_path_factory.mktemp("model"), **sizes)


def recipe_of(model: Path, attention: str, checkpointing: bool) -> Recipe:
    """Dropout, and all experts for every token: no border between experts that rounding could cross."""
    adapter = {"num_experts": 3, "top_k": 3, "lora_dropout": 0.2}
    recipe = make_recipe(model, adapter=adapter, optim={"name": "sgd", "lr": 0.3}, max_steps=NUM_STEPS, seed=4)
    train = replace(
        recipe.train,
        batch_size=BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        activation_checkpointing=checkpointing,
    )
    return replace(recipe, model=replace(recipe.model, attention=attention), train=train)


def weights_of(outcomes: list[Outcome]) -> dict[str, Tensor]:
    shapes: dict[str, int] = {}
    for outcome in outcomes:
        for name, pieces in outcome.numbers["value"].items():
            shapes[name] = max(shapes.get(name, 0), *(stop for _, stop, _ in pieces))
    return put_together(
        [outcome.numbers for outcome in outcomes], "value", {n: torch.Size([s]) for n, s in shapes.items()}
    )


@pytest.mark.parametrize(
    ("world_size", "attention", "checkpointing"),
    [(1, "sdpa", False), (1, "eager", False), (2, "sdpa", True), thorough(2, "sdpa", False)],
)
def test_packing_changes_no_loss_and_no_weight(
    worker_pool: PoolFactory, model: Path, world_size: int, attention: str, checkpointing: bool
) -> None:
    recipe = recipe_of(model, attention, checkpointing)
    packed = worker_pool(world_size).run(train_on_rank, Job(recipe, packed=True))
    apart = worker_pool(world_size).run(train_on_rank, Job(recipe, packed=False))
    for one, other in zip(packed, apart, strict=True):
        assert one.losses[-1] < one.losses[0] and len(one.losses) == NUM_STEPS
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.eval_loss, other.eval_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.grad_norms, other.grad_norms, rtol=1e-4, atol=0)
        assert one.num_tokens == other.num_tokens, "padding is no token"
        assert one.num_columns < other.num_columns
    expected = weights_of(apart)
    for name, value in weights_of(packed).items():
        assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_ranks_change_nothing_in_packed_training(worker_pool: PoolFactory, model: Path) -> None:
    losses = LossesConfig(contrastive=0.01, contrastive_tokens=CAPACITY)
    recipe = replace(recipe_of(model, "sdpa", checkpointing=False), losses=losses)
    (alone,), pair = (worker_pool(size).run(train_on_rank, Job(recipe, packed=True)) for size in (1, 2))
    for share in pair:
        torch.testing.assert_close(share.losses, alone.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(share.contrastive, alone.contrastive, rtol=1e-5, atol=0)
    assert alone.contrastive[0] == pytest.approx(contrastive_at_the_start(), rel=1e-5)


def contrastive_at_the_start() -> float:
    """With outputs of 0, an output of a sample of n tokens counts `log(1 + negatives)`: those of two other experts."""
    from dsmoelora.data import train_steps

    samples: Any = Samples()
    layout = {"rank": 0, "world_size": 1, "pad_token_id": 0, "batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE}
    packing = pack(samples.num_tokens, CAPACITY, seed=1)
    ((batch,),) = islice(train_steps(samples, seed=1, packing=packing, **layout), 1)
    of_rows = []
    for ids, mask in zip(batch.sequence_ids, batch.attention_mask, strict=True):
        _, counts = ids[mask == 1].unique(return_counts=True)
        of_rows.append(float((counts * (1 + 2 * counts).log()).sum() / counts.sum()))
    return sum(of_rows) / len(of_rows)
