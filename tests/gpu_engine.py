"""What the tests of an engine on one device do; on a GPU, and on a CPU so that they are known to work."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.engine_ranks import Job, batches_of, build_engine

NUM_STEPS = 3


@dataclass
class Learned:
    """Of a few steps on one batch.

    Args:
        losses: of the steps, and the held-out loss after them
        devices: types of device on which values and moments lie
        dead: tensors that got no gradient or did not move, as the canary sees it
    """

    losses: list[float]
    devices: set[str]
    dead: list[str]


def learn(recipes: list[Recipe]) -> list[Learned]:
    """Train by each recipe under ZeRO-3; called on every rank."""
    found = []
    for recipe in recipes:
        job = Job(recipe)
        engine = build_engine(job)
        engine.watch.start()
        results = [engine.train_step(batches_of(job, 0)) for _ in range(NUM_STEPS)]
        assert not any(result.skipped for result in results), recipe.adapter
        statistics_of = engine.watch.stop()
        dead = [name for name, one in statistics_of.items() if not (one["grad_norm"] > 0 and one["moved"] > 0)]
        devices = {shard.tensor.device.type for shard in engine.optimizer.shards}
        devices |= {moment.device.type for state in engine.optimizer.state.values() for moment in state.values()}
        losses = [*(result.loss for result in results), engine.evaluate(batches_of(job, 0))]
        found.append(Learned(losses, devices, dead))
    return found


def assert_healthy(found: list[Learned], device: str) -> None:
    """Finite losses that fall, every tensor alive, and everything where it belongs."""
    for one in found:
        assert one.losses[-1] < one.losses[0] < torch.inf
        assert not one.dead
        assert one.devices == {device}


def answers(recipe: Recipe) -> list[str]:
    """What an engine says to two conversations of uneven lengths; the same if asked again."""
    engine = build_engine(Job(recipe))
    asked = [Prompt([{"role": "user", "content": text}]) for text in ("a", "What is this?")]
    said = engine.generate(asked, max_new_tokens=4)
    assert said == engine.generate(asked, max_new_tokens=4)
    return said


def waits_of_a_step(recipe: Recipe) -> int:
    """Synchronisations of the host in a step, after two that set everything up: torch warns of each of them."""
    import warnings

    job = Job(recipe)
    engine = build_engine(job)
    for _ in range(2):
        engine.train_step(batches_of(job, 0))
    batches = [batch.with_tensors(torch.Tensor.pin_memory) for batch in batches_of(job, 0)]
    with warnings.catch_warnings(record=True) as caught, syncs_are("warn"):
        warnings.simplefilter("always")
        engine.train_step(batches)
    return sum("synchroniz" in str(one.message) for one in caught)


def accumulate_without_a_wait(recipe: Recipe) -> None:
    """Forward and backward of a micro-batch, in which any synchronisation of the host raises."""
    job = Job(recipe)
    engine = build_engine(job)
    engine.train_step(batches_of(job, 0))
    batches = [batch.with_tensors(torch.Tensor.pin_memory) for batch in batches_of(job, 0)]
    with syncs_are("error"):
        engine._accumulate(batches)


@contextmanager
def syncs_are(mode: str) -> Iterator[None]:
    """What torch does when the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peaks_of_steps(recipe: Recipe, num_steps: int) -> list[int]:
    """Bytes allocated at most during each step; all the same number where there is no GPU."""
    job = Job(recipe)
    engine = build_engine(job)
    peaks = []
    for _ in range(num_steps):
        get_accelerator().reset_peak_memory_stats()
        engine.train_step(batches_of(job, 0))
        peaks.append(int(get_accelerator().max_memory_allocated()))
    return peaks


def grows(peaks: list[int]) -> bool:
    """Whether later steps take more than the first ones by more than an allocator's noise."""
    half = len(peaks) // 2
    return statistics.median(peaks[half:]) > 1.05 * statistics.median(peaks[1:half]) + 2**20


def join_over_gloo() -> str:
    """Join ranks that share one device, which NCCL refuses; returns where this rank's tensors lie."""
    from dsmoelora.parallel import comm, ranks

    ranks.adopt_launcher_environment()
    with mock.patch.object(get_accelerator(), "communication_backend_name", lambda: "gloo"):
        comm.init()
    return str(get_accelerator().current_device_name())


def save_half_way(recipe: Recipe, folder: Path) -> Job:
    """The job of the second half of a training, of which `first_half` writes the first."""
    half = recipe.train.max_steps // 2
    return Job(recipe, first_step=half, load_from=folder / f"checkpoint-{half}")


def first_half(recipe: Recipe, folder: Path) -> Job:
    """See `save_half_way`."""
    return Job(recipe, last_step=recipe.train.max_steps // 2, save_to=folder)
