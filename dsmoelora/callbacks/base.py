"""What hangs on the training loop: named hooks, and the view of the run that they get."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoelora.config import Recipe
from dsmoelora.data import InstructionDataset
from dsmoelora.engine import Engine, StepResult


@dataclass
class TrainingRun:
    """The run as its callbacks see it.

    Args:
        recipe: of the run
        engine: model and optimizer; its methods are collective
        folder: `runs/<name>`
        eval_data: held-out samples, if the recipe names any
        start_step: optimizer step that this process began or went on from
        is_open: the line of metrics of `start_step` was not complete when its checkpoint was written
        evaluations: (step, held-out loss) so far, in order, those before a resume included
        metrics: the line of the present step; callbacks may add to it in `on_step_end`
        tables: what belongs into that line but is more than a number; JSON-able
    """

    recipe: Recipe
    engine: Engine
    folder: Path
    eval_data: InstructionDataset | None
    start_step: int = 0
    is_open: bool = False
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.engine.step

    @property
    def first_row(self) -> int:
        """Step of the first line of metrics that this process writes; those before it stand."""
        return self.start_step if self.start_step == 0 or self.is_open else self.start_step + 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.train.max_steps


class Callback:
    """Hooks of the training loop; the defaults do nothing.

    A callback that calls the engine must be on every rank, since the engine's methods are collective; one that only
    reads and writes belongs on rank 0 alone. Errors of a hook end the run.
    """

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: JSON-able, the same on all ranks."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, before `on_train_begin` of a resumed run."""

    def on_train_begin(self, run: TrainingRun) -> None:
        """Before the first evaluation and the first step."""

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """After an optimizer step, before an evaluation that may follow it."""

    def on_evaluate(self, run: TrainingRun, loss: float) -> None:
        """After an evaluation; `loss` is the held-out mean negative log likelihood per supervised token."""

    def on_metrics(self, run: TrainingRun) -> None:
        """When the line of a step is complete (`run.metrics`), before a checkpoint that may follow it."""

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        """After a checkpoint was written."""

    def on_train_end(self, run: TrainingRun) -> None:
        """After the last step, with checkpoint and adapter in place."""

    def on_stop(self, run: TrainingRun) -> None:
        """Instead of `on_train_end`, when the run was asked to stop and its checkpoint, if there is one, is in place.

        The request may have come before `on_train_begin`.
        """
