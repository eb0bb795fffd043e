"""Runs what is missing of a task: for every arm a rate, and then all seeds at that rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.halving import choose_rate
from benchmarks.study.paired import halves
from benchmarks.study.state import forget_states

# Trains these cells up to a step, several at a time, and returns when all are there.
Train = Callable[[Sequence[Cell], int], object]


@dataclass(frozen=True)
class Chosen:
    """The rate of an arm, as it is kept in the arm's folder.

    Args:
        lr: best after all steps, on the choosing half of the held-out rows
        tried: losses there of all rates that came to the last step with every seed that chooses
    """

    lr: float
    tried: dict[str, float]

    @classmethod
    def file(cls, task: Task, arm: str) -> Path:
        """Where it is kept."""
        return task.folder / arm / "chosen.json"

    @classmethod
    def read(cls, task: Task, arm: str) -> Chosen | None:
        """None where no rate has been chosen yet."""
        file = cls.file(task, arm)
        return cls(**json.loads(file.read_text())) if file.exists() else None


def search(task: Task, arm: str, train: Train) -> None:
    """Choose the rate of an arm, and run all seeds at it.

    What halving looks at early is the loss of the first seed; after all steps it is the mean over `task.rate_seeds`.
    """
    choosing, _ = halves(len(task.tokens_N))
    tried: dict[str, float] = {}

    def losses_at(rates: Sequence[float], steps: int) -> Mapping[float, float]:
        at_end = steps == task.num_steps
        cells = {rate: [Cell(arm, rate, seed) for seed in task.rate_seeds[: None if at_end else 1]] for rate in rates}
        train([cell for of_rate in cells.values() for cell in of_rate], steps)
        losses = {rate: statistics.mean(loss_of(cell, steps) for cell in of_rate) for rate, of_rate in cells.items()}
        if at_end:
            tried.update({f"{rate:g}": loss for rate, loss in losses.items() if math.isfinite(loss)})
        return losses

    def loss_of(cell: Cell, steps: int) -> float:
        return Results.read(cell, task).loss_at(steps, task.tokens_N, choosing)

    lr = choose_rate(Cell(arm, 0.0).of.rates, task.num_steps, losses_at)
    Chosen.file(task, arm).write_text(json.dumps(vars(Chosen(lr, tried))))
    for folder in (task.folder / arm).iterdir():
        forget_states(folder)
    train([Cell(arm, lr, seed) for seed in task.seeds], task.num_steps)
