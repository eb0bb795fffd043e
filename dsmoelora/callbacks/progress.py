"""Where the run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.engine import StepResult

SECONDS_BETWEEN_LINES = 15.0


class ProgressBar(Callback):
    """Shows step, loss, learning rate, tokens per second and time left (rank 0).

    Args:
        console: where it goes; decides between bar and lines
        seconds_between_lines: without a terminal, at most one line in this time (evaluations always get theirs)
    """

    def __init__(self, console: Console, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._between = seconds_between_lines
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._begin = self._last_line = 0.0
        self._eval_loss: float | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        self._begin = time.monotonic()
        if run.evaluations:
            self._eval_loss = run.evaluations[-1][1]
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=run.num_steps, completed=run.start_step)
        self._bar.start()

    def on_evaluate(self, run: TrainingRun, loss: float) -> None:
        self._eval_loss = loss
        self._say(f"step {run.step}/{run.num_steps}  held-out loss {loss:.4f}")

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        speed = run.metrics["throughput(tokens/s)"] or 0.0
        text = f"loss {result.loss:.4f}  lr {result.lr:.2e}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            held_out = "" if self._eval_loss is None else f"  held-out {self._eval_loss:.4f}"
            self._bar.update(self._task, completed=run.step, description=text + held_out)
        elif self._is_time(run):
            left = (time.monotonic() - self._begin) / (run.step - run.start_step) * (run.num_steps - run.step)
            self._say(f"step {run.step}/{run.num_steps}  {text}  {_clock(left)} left")

    def on_train_end(self, run: TrainingRun) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_stop(self, run: TrainingRun) -> None:
        self.on_train_end(run)

    def _is_time(self, run: TrainingRun) -> bool:
        now = time.monotonic()
        due = now - self._last_line >= self._between or run.step in (run.start_step + 1, run.num_steps)
        if due:
            self._last_line = now
        return due

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
