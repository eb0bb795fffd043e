"""Runs what is missing of a task: for every arm a rate, and then all seeds at that rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        tried: losses there of all rates that came to the last step
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
    """Choose the rate of an arm with the first seed, and run all seeds at it."""
    first, *_ = task.seeds
    choosing, _ = halves(len(task.tokens_N))

    def losses_at(rates: Sequence[float], steps: int) -> Mapping[float, float]:
        cells = [Cell(arm, rate, first) for rate in rates]
        train(cells, steps)
        return {cell.lr: Results.read(cell, task).loss_at(steps, task.tokens_N, choosing) for cell in cells}

    lr = choose_rate(Cell(arm, 0.0).of.rates, task.num_steps, losses_at)
    tried = {f"{results.cell['lr']:g}": results for results in all_results(task, arm) if results.cell["seed"] == first}
    reached = {rate: results.nll_at(task.num_steps) for rate, results in tried.items()}
    losses = {rate: _loss(nll_N, task.tokens_N, choosing) for rate, nll_N in reached.items() if nll_N is not None}
    Chosen.file(task, arm).write_text(json.dumps(vars(Chosen(lr, losses))))
    for folder in (task.folder / arm).iterdir():
        forget_states(folder)
    train([Cell(arm, lr, seed) for seed in task.seeds], task.num_steps)


def _loss(nll_N: np.ndarray, tokens_N: np.ndarray, rows: np.ndarray) -> float:
    return float(nll_N[rows].sum() / tokens_N[rows].sum())


def all_results(task: Task, arm: str) -> list[Results]:
    """Of every cell of an arm that has begun, by rate and seed."""
    files = (task.folder / arm).glob("lr*/results.json")
    found = [Results(**json.loads(file.read_text())) for file in files]
    return sorted(found, key=lambda results: (results.cell["lr"], results.cell["seed"]))
