"""Curves elsewhere: TensorBoard, Weights & Biases, trackio, as `train.report_to` names them."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.callbacks.metrics import scalars
from dsmoelora.callbacks.tensorboard import TensorBoard
from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError

WANDB_ID_FILE = "wandb_id.txt"


class Tracker(Callback):
    """Sends `run.metrics` to an open run of W&B or trackio, which have the same interface (rank 0).

    Args:
        tracked: what `init` of either package returned
    """

    def __init__(self, tracked: Any) -> None:
        self._tracked = tracked

    def on_metrics(self, run: TrainingRun) -> None:
        self._tracked.log(scalars(run.metrics), step=run.step)

    def on_train_end(self, run: TrainingRun) -> None:
        self._tracked.finish()

    def on_stop(self, run: TrainingRun) -> None:
        self.on_train_end(run)


def open_trackers(recipe: Recipe, folder: Path, resumed: bool) -> list[Callback]:
    """A callback for each name in `train.report_to`, its run open (rank 0, before the model is loaded).

    Args:
        recipe: of the run
        folder: of the run, in place
        resumed: go on with the curves of before

    Raises:
        ConfigError: a package cannot open its run: nobody is logged in, its server is out of reach
    """
    return [_OPEN[name](recipe, folder, resumed) for name in recipe.train.report_to]


def _open_tensorboard(recipe: Recipe, folder: Path, resumed: bool) -> Callback:
    return TensorBoard()


def _open_wandb(recipe: Recipe, folder: Path, resumed: bool) -> Callback:
    # W&B knows a run by an id of its own. Steps that a resumed run takes again have the values of the first time;
    # W&B drops them, for its steps only grow.
    file = folder / WANDB_ID_FILE
    if not (resumed and file.exists()):
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return _open(
        "wandb",
        "Log in (`wandb login`), or set the environment variable WANDB_MODE=offline",
        project=os.environ.get("WANDB_PROJECT", recipe.train.project),
        name=recipe.run.name,
        id=file.read_text().strip(),
        resume="allow",
        dir=str(folder),
        config=asdict(recipe),
    )


def _open_trackio(recipe: Recipe, folder: Path, resumed: bool) -> Callback:
    return _open(
        "trackio",
        "Look at its environment variables (TRACKIO_DIR, TRACKIO_SPACE_ID)",
        project=recipe.train.project,
        name=recipe.run.name,
        resume="allow" if resumed else "never",
        config=asdict(recipe),
    )


def _open(package: str, remedy: str, **arguments: Any) -> Callback:
    try:
        return Tracker(importlib.import_module(package).init(**arguments))
    except Exception as error:  # of packages that need not be there
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise ConfigError(
            f"train.report_to has {package!r}, but {package} cannot open a run: {reason.rstrip('.')}. "
            f"{remedy}, or take it out of train.report_to."
        ) from error


_OPEN: Mapping[str, Callable[[Recipe, Path, bool], Callback]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
