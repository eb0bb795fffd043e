"""What came of a study: a table a task, and curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.study.arms import ARMS
from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.paired import difference, halves, interval, mean_loss, steps_to_reach
from benchmarks.study.search import Chosen

_COLUMNS = (
    *("arm", "what it is", "trained", "seeds", "lr", "held-out loss"),
    *("against the control, 95 %", "steps to its loss", "CPU-seconds"),
)


class Outcome:
    """The cells of an arm at its rate, on the reporting half of the held-out rows.

    Args:
        task: which
        arm: name
        chosen: its rate

    Attributes:
        by_seed: results of the seeds that came to their end
        num_diverged: seeds that did not
    """

    def __init__(self, task: Task, arm: str, chosen: Chosen) -> None:
        self._task, self.arm, self.lr = task, arm, chosen.lr
        _, self._rows = halves(len(task.tokens_N))
        self.tokens_N = task.tokens_N[self._rows]
        found = {seed: Results.read(Cell(arm, chosen.lr, seed), task) for seed in task.seeds}
        self.num_diverged = sum(one.diverged_at is not None for one in found.values())
        self.by_seed = {seed: one for seed, one in found.items() if one.nll_at(task.num_steps) is not None}

    def nll_SN(self, seeds: Sequence[int], step: int | None = None) -> np.ndarray:
        """(S, N) after a step, the last by default."""
        at = [self.by_seed[seed].nll_at(step or self._task.num_steps) for seed in seeds]
        return np.stack([nll_N[self._rows] for nll_N in at if nll_N is not None])

    def losses(self) -> list[float]:
        """Of every seed, at the end."""
        return mean_loss(self.nll_SN(list(self.by_seed)), self.tokens_N).tolist()

    def curve(self, seeds: Sequence[int]) -> list[tuple[int, float]]:
        """Steps, and the mean loss over these seeds after them."""
        steps = [one["step"] for one in self.by_seed[seeds[0]].evaluations]
        return [(step, float(mean_loss(self.nll_SN(seeds, step), self.tokens_N).mean())) for step in steps]

    @property
    def num_trained(self) -> int:
        """Trained numbers."""
        return next(iter(self.by_seed.values())).num_trained

    @property
    def seconds(self) -> float:
        """CPU-seconds of the training, the mean over seeds."""
        return statistics.mean(one.evaluations[-1]["seconds"] for one in self.by_seed.values())


def outcomes(task: Task, arms: Sequence[str]) -> list[Outcome]:
    """Of the arms that have come to an end, in this order."""
    chosen = [(arm, found) for arm in arms if (found := Chosen.read(task, arm)) is not None]
    return [found for arm, one in chosen if (found := Outcome(task, arm, one)).by_seed]


def table(task: Task, arms: Sequence[str]) -> list[str]:
    """Markdown, the control first; differences, and steps to its loss, are of the seeds and rows that both have.

    Args:
        task: which
        arms: names; the first is the control
    """
    found = outcomes(task, arms)
    if not found or found[0].arm != arms[0]:
        return [f"{task.folder.name}: the control ({arms[0]}) has not come to its end."]
    control = found[0]
    losses = control.losses()
    noise = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "unknown"
    about = f"{task.num_steps} steps of {task.batch_size} rows, {task.depth} depth, {task.dtype}"
    lines = [
        f"{task.folder.name}: {about}. Noise floor, the control's standard deviation over its seeds: {noise}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{len(_COLUMNS) * '---|'}",
    ]
    lines += [_line(one, control) for one in found]
    shown = {one.arm for one in found}
    missing = [arm for arm in arms if arm not in shown]
    return lines + (["", f"Not at their end: {', '.join(missing)}."] if missing else [])


def _line(one: Outcome, control: Outcome) -> str:
    losses = one.losses()
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    seeds = [seed for seed in one.by_seed if seed in control.by_seed]
    if not seeds:
        against, steps = "no seed in common", ""
    elif one is control:
        against, steps = "", f"{one.curve(seeds)[-1][0]}"
    else:
        pair = one.nll_SN(seeds), control.nll_SN(seeds), one.tokens_N
        low, high = interval(*pair)
        against = f"{difference(*pair):+.4f} [{low:+.4f}, {high:+.4f}]"
        reached = steps_to_reach(one.curve(seeds), control.curve(seeds)[-1][1])
        steps = "not reached" if reached is None else f"{reached:.0f}"
    cells = (one.arm, ARMS[one.arm].why, f"{one.num_trained:,}", f"{len(losses)}", f"{one.lr:g}")
    lost = f", {one.num_diverged} diverged" if one.num_diverged else ""
    loss = f"{statistics.mean(losses):.4f}{spread}{lost}"
    return f"| {' | '.join((*cells, loss, against, steps, f'{one.seconds:.0f}'))} |"


def plot(tasks: Sequence[Task], arms: Sequence[str], out: Path) -> None:
    """For every task: loss against steps at the chosen rate, and against the rate after all steps, a line an arm.

    The first is over the reporting half of the rows and all seeds, the second over the choosing half and one seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(11, 4 * len(tasks)), squeeze=False)
    for (by_step, by_rate), task in zip(axes, tasks, strict=True):
        for number, one in enumerate(outcomes(task, arms)):
            style = {"label": one.arm, "marker": ".", "color": f"C{number % 10}"}
            by_step.plot(*zip(*one.curve(list(one.by_seed)), strict=True), **style)
            chosen = Chosen.read(task, one.arm)
            tried = sorted((float(rate), loss) for rate, loss in chosen.tried.items()) if chosen else []
            by_rate.plot(*zip(*tried, strict=True), **style)
        by_step.set(title=task.folder.name, xlabel="step", ylabel="held-out loss")
        by_rate.set(title="by learning rate", xlabel="learning rate", xscale="log")
        by_step.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
