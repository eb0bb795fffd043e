"""Where the run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from rich.console import Console

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.utilisation import MFU
from dsmoelora.engine import StepResult
from dsmoelora.signs_of_life.meter import SECONDS_BETWEEN_LINES, Meter


class ProgressBar(Callback):
    """Shows step, loss, learning rate, tokens per second, known shares of the peak, and time left (rank 0).

    Args:
        console: where it goes; decides between bar and lines
        seconds_between_lines: without a terminal, at most one line in this time (evaluations always get theirs)
    """

    def __init__(self, console: Console, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._between = seconds_between_lines
        self._meter: Meter | None = None
        self._eval_loss: float | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        if run.evaluations:
            self._eval_loss = run.evaluations[-1][1]
        self._meter = Meter(self._console, run.num_steps, run.start_step, _where(run), self._between)

    def on_evaluate(self, run: TrainingRun, loss: float) -> None:
        self._eval_loss = loss
        scores = [f"  {key.removeprefix('eval/')} {value:.1%}" for key, value in run.metrics.items() if _is_score(key)]
        line = f"{_where(run)}  held-out loss {loss:.4f}{''.join(scores)}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        assert self._meter is not None, "training has begun"
        speed = run.metrics["throughput(tokens/s)"] or 0.0
        text = f"loss {result.loss:.4f}  lr {result.lr:.2e}  {speed:,.0f} tokens/s"
        if (share := run.metrics.get(MFU)) is not None:
            text += f"  mfu {share:.1f}%"
        if self._console.is_terminal and self._eval_loss is not None:
            text += f"  held-out {self._eval_loss:.4f}"
        self._meter.update(run.step, _where(run), text)

    def on_train_end(self, run: TrainingRun) -> None:
        if self._meter is not None:
            self._meter.stop()

    def on_stop(self, run: TrainingRun) -> None:
        self.on_train_end(run)


def _is_score(key: str) -> bool:
    return key.startswith("eval/") and key != "eval/loss"


def _where(run: TrainingRun) -> str:
    return f"step {run.step}/{run.num_steps}"
