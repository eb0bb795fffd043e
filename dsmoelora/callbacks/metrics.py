"""`metrics.jsonl`: one object a line, each step once, whatever interruptions there were."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.run.files import METRICS_FILE, read_metrics


class MetricsFile(Callback):
    """Appends `run.metrics` and `run.tables` to `metrics.jsonl` (rank 0).

    A resumed run drops the lines after its checkpoint first: those steps are taken again. A number that is not
    finite becomes `null`, for JSON has no other word for it.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        path = run.folder / METRICS_FILE
        if path.exists():
            _drop_from(path, run.first_row)
        self._file = path.open("a", encoding="utf-8")

    def on_metrics(self, run: TrainingRun) -> None:
        assert self._file is not None
        row = {name: _finite(value) for name, value in run.metrics.items()} | run.tables
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        # The lines up to a checkpoint must outlive a crash of the machine as the checkpoint does.
        assert self._file is not None
        os.fsync(self._file.fileno())

    def on_train_end(self, run: TrainingRun) -> None:
        assert self._file is not None
        self._file.close()

    def on_stop(self, run: TrainingRun) -> None:
        if self._file is not None:
            self._file.close()


def scalars(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The finite numbers of a line, named for tools that group by what stands before the slash; without the step."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in metrics.items()
        if name != "step" and value is not None and math.isfinite(value)
    }


def _drop_from(path: Path, step: int) -> None:
    """Drop the lines from `step` on; the file is replaced in one go, so that a crash loses none of the others."""
    rows = [row for row in read_metrics(path) if (row["step"] or 0) < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
