"""Curves for TensorBoard, out of the same numbers as `metrics.jsonl`."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.metrics import scalars

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Writes `run.metrics` as scalars to `tensorboard/` in the run folder (rank 0)."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        # purge_step hides what an interrupted run wrote after the checkpoint that this one goes on from
        purge_step = run.first_row or None
        self._writer = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=purge_step)

    def on_metrics(self, run: TrainingRun) -> None:
        assert self._writer is not None
        for name, value in scalars(run.metrics).items():
            self._writer.add_scalar(name, value, run.step)

    def on_train_end(self, run: TrainingRun) -> None:
        assert self._writer is not None
        self._writer.close()

    def on_stop(self, run: TrainingRun) -> None:
        self.on_train_end(run)
