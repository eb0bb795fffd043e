"""One run of one arm: what it is, and what is known of it. A cell is a folder, so that a study can stop and go on."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.arms import ARMS, Arm
from benchmarks.study.halving import budgets
from dsmoelora.config import AdapterConfig, LossesConfig, OptimConfig
from dsmoelora.config.dtype import DtypeName
from dsmoelora.errors import ConfigError
from dsmoelora.model.folder import base_digest

_LONG = 200  # steps, of which an eighth is trained for longer than held-out rows are looked at


@dataclass(frozen=True)
class Task:
    """What all cells of a task share.

    Args:
        folder: of the cells
        model: folder of the base
        template: file of a chat template instead of the model's own
        train, held_out: JSONL files
        num_steps, batch_size: of a whole run
        eval_rows: held-out rows that are looked at
        max_length: tokens of a row
        depth: which layers are adapted: the upper `sixth`, `third` or `half` of them, or all (`full`)
        dtype: that the model computes in; what is trained is fp32
        seeds: that may run
        rate_seeds: those of them that choose a rate
    """

    folder: Path
    model: Path
    template: Path | None
    train: Path
    held_out: Path
    num_steps: int
    batch_size: int
    eval_rows: int
    max_length: int
    depth: str
    dtype: DtypeName
    seeds: tuple[int, ...]
    rate_seeds: tuple[int, ...]

    @property
    def evaluated_at(self) -> list[int]:
        """After which steps held-out rows are looked at."""
        count = 8 if self.num_steps >= _LONG else 2
        even = (round(part * self.num_steps / count) for part in range(1, count + 1))
        return sorted({*even, *budgets(self.num_steps)} - {0})

    @property
    def tokens_file(self) -> Path:
        """Has the targets of each held-out row, once the task is prepared."""
        return self.folder / "held_out_tokens.json"

    @property
    def tokens_N(self) -> np.ndarray:
        """Targets of each held-out row."""
        return np.array(json.loads(self.tokens_file.read_text()))

    def settings(self) -> dict[str, Any]:
        """What a cell of it is remembered by; JSON-able."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("folder", "seeds", "rate_seeds")}
        return {key: _digest(value) if isinstance(value, Path) else value for key, value in kept.items()}


@functools.cache
def _digest(path: Path) -> str:
    """Of a file, or of a model, wherever it lies."""
    digest = base_digest(str(path)) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return digest[:16]


@dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        arm: name, of `ARMS`
        lr: learning rate
        seed: of adapters and the order of samples
    """

    arm: str
    lr: float
    seed: int = 0

    @property
    def of(self) -> Arm:
        """The arm itself."""
        return ARMS[self.arm]

    def folder(self, task: Task) -> Path:
        """Where all of it lies."""
        return task.folder / self.arm / f"lr{self.lr:g}-seed{self.seed}"


def _is_same_arm(found: Results, fresh: Results) -> bool:
    """Whether two cells have the same settings; keys younger than one of them have their defaults in the other."""
    defaults = {"adapter": AdapterConfig(), "optim": OptimConfig(), "losses": LossesConfig()}
    for section, config in defaults.items():
        known, wanted, default = found.settings["arm"][section], fresh.settings["arm"][section], asdict(config)
        younger = {key for key in wanted.keys() - known.keys() if wanted[key] == default[key]}
        if {key: value for key, value in wanted.items() if key not in younger} != known:
            return False
    return found.settings["arm"].get("one_first", False) == fresh.settings["arm"]["one_first"]


@dataclass
class Results:
    """What is known of a cell.

    Args:
        cell: which
        settings: of arm and task
        num_trained: trained numbers
        evaluations: `step`, CPU `seconds` of training so far, `nll` of every held-out row; none where it diverged
        diverged_at: the first step whose loss was not finite
    """

    cell: dict[str, Any]
    settings: dict[str, Any]
    num_trained: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    diverged_at: int | None = None

    @classmethod
    def read(cls, cell: Cell, task: Task) -> Results:
        """From the folder, or of a cell that has not begun.

        Raises:
            ConfigError: the folder has results of other settings
        """
        fresh = cls(asdict(cell), {"arm": cell.of.settings(), "task": task.settings()})
        fresh = cls(**json.loads(json.dumps(vars(fresh))))
        file = cell.folder(task) / "results.json"
        if not file.exists():
            return fresh
        found = cls(**json.loads(file.read_text()))
        then, now = found.settings["task"], fresh.settings["task"]
        other = [
            f"{key} {then.get(key)}, not {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)
        ]
        if not _is_same_arm(found, fresh):
            other.append(f"arm {cell.arm} as it was")
        if other:
            told = f"{file} was made with other settings ({'; '.join(other)})"
            raise ConfigError(f"{told}. Give these, or take another --name, or this folder away.")
        return found

    def write(self, folder: Path) -> None:
        """As a whole or not at all."""
        partial = folder / "results.partial"
        partial.write_text(json.dumps(vars(self)))
        partial.replace(folder / "results.json")

    @property
    def step(self) -> int:
        """Steps taken and looked at."""
        return self.evaluations[-1]["step"] if self.evaluations else 0

    def is_done(self, num_steps: int) -> bool:
        """Whether there is nothing to train up to this step."""
        return self.diverged_at is not None or self.step >= num_steps

    def nll_at(self, step: int) -> np.ndarray | None:
        """(N,) of the held-out rows; None where it has not come to that step, or diverged before it."""
        found = next((one["nll"] for one in self.evaluations if one["step"] == step), None)
        return None if found is None else np.array(found)

    def loss_at(self, step: int, tokens_N: np.ndarray, rows: Sequence[int] | np.ndarray) -> float:
        """Over some rows; infinity where it diverged."""
        nll_N = self.nll_at(step)
        return math.inf if nll_N is None else float(nll_N[rows].sum() / tokens_N[rows].sum())
