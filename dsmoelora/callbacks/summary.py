"""The last words of a run: what it reached, and where everything lies."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path

from rich.console import Console

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.tensorboard import TENSORBOARD_FOLDER
from dsmoelora.run.files import ADAPTER_FOLDER, METRICS_FILE


class Summary(Callback):
    """Prints held-out loss before and after, skipped steps, the folders, and how to talk to the result (rank 0)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = time.monotonic()
        self._checkpoint: Path | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        self._begin = time.monotonic()

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    def on_train_end(self, run: TrainingRun) -> None:
        for line in self._lines(run):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _lines(self, run: TrainingRun) -> list[str]:
        minutes = (time.monotonic() - self._begin) / 60
        taken = run.step - run.start_step
        lines = [f"Done: step {run.step} of {run.num_steps}, {taken} of them now, in {minutes:.1f} minutes."]
        if run.engine.skipped_steps:
            lines.append(
                f"Skipped steps: {run.engine.skipped_steps} (loss or gradient was not finite). "
                "A lower optim.lr, a longer optim.warmup_steps or fp32 may help."
            )
        if run.evaluations:
            lines.append(_held_out(run.evaluations))
        adapter = run.folder / ADAPTER_FOLDER
        lines += [
            f"Run folder:   {run.folder}",
            f"Adapter:      {adapter}",
            f"Metrics:      {run.folder / METRICS_FILE}",
        ]
        if "tensorboard" in run.recipe.train.report_to:
            lines.append(f"Curves:       tensorboard --logdir {shlex.quote(str(run.folder / TENSORBOARD_FOLDER))}")
        if self._checkpoint is not None:
            lines.append(f"Checkpoint:   {self._checkpoint}")
        talk = f'python launch/generate.py --adapter {shlex.quote(str(adapter))} --prompt "..."'
        return [*lines, f"Talk to it:   {talk}"]


def _held_out(evaluations: list[tuple[int, float]]) -> str:
    (first_step, before), (last_step, after) = evaluations[0], evaluations[-1]
    if first_step == last_step:
        return f"Held-out loss: {before:.4f} at step {first_step}"
    both = f"Held-out loss: {before:.4f} (step {first_step}) -> {after:.4f} (step {last_step})"
    change = 100 * (after - before) / before
    return f"{both}, {change:+.1f}%" if math.isfinite(change) else both
