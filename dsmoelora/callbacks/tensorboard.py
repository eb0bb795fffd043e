"""Curves for TensorBoard, out of the same numbers as `metrics.jsonl`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.metrics import scalars

TENSORBOARD_FOLDER = "tensorboard"
_PIXELS = 8  # of one expert in a heat map, in both directions


class TensorBoard(Callback):
    """Writes `run.metrics` as scalars, and how experts are used as heat maps, to `tensorboard/` (rank 0)."""

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
        if "experts" in run.tables:
            self._add_experts(run.tables["experts"], run.step)
            self._add_cosines(run.tables["cosines"], run.step)

    def _add_experts(self, table: dict[str, Any], step: int) -> None:
        """Heat maps of layers by experts, and the entropy of each layer's gates."""
        assert self._writer is not None
        for what in ("share", "gate"):
            self._add_heat(f"experts/{what}", table[what], step)
        for layer, entropy in zip(table["layers"], table["entropy"], strict=True):
            self._writer.add_scalar(f"experts_entropy/{layer}", entropy, step)

    def _add_cosines(self, table: dict[str, Any], step: int) -> None:
        """A heat map of each expert's largest cosine with another one (below 0 and unknown: black), means of layers."""
        assert self._writer is not None
        self._add_heat("experts/cosine", [[max(0.0, one or 0.0) for one in row] for row in table["largest"]], step)
        for layer, mean in zip(table["layers"], table["mean"], strict=True):
            if mean is not None:
                self._writer.add_scalar(f"experts_cosine/{layer}", mean, step)

    def _add_heat(self, name: str, rows: list[list[float]], step: int) -> None:
        assert self._writer is not None
        heat = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        image = (heat / heat.max().clamp(min=1e-9)).kron(torch.ones(_PIXELS, _PIXELS))
        self._writer.add_image(name, image, step, dataformats="HW")

    def on_train_end(self, run: TrainingRun) -> None:
        assert self._writer is not None
        self._writer.close()

    def on_stop(self, run: TrainingRun) -> None:
        if self._writer is not None:
            self._writer.close()
