"""Tasks of lm-evaluation-harness, asked of a whole model a rank: its requests, our ranks and collectives.

Its own model takes the process's number on its node for the rank, which is wrong on several nodes, and passes objects
between processes as pickles; here both go through `parallel.comm`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoelora.errors import ConfigError, DataError, bad_value, listing
from dsmoelora.parallel import comm


@dataclass(frozen=True)
class TaskScore:
    """One number of one task.

    Args:
        task: its name
        metric: with the filter of the harness where there is one: `exact_match (strict-match)`
        value, error: with its standard error; NaN where the harness gives none
    """

    task: str
    metric: str
    value: float
    error: float


def check_harness() -> None:
    """Make sure that the harness is installed.

    Raises:
        ConfigError: it is not
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness. pip install 'dsmoelora[eval]'")


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's list of tasks, after their data were found too (every rank).

    Args:
        names: of tasks, groups or patterns
        folder: with more tasks, as YAML files; one of them counts more than one of the harness's own

    Raises:
        ConfigError: there is no such task
        DataError: the data of one cannot be had
    """
    manager: Any = None
    unknown = list(names)
    if folder is not None:  # without those of the harness first, whose thousands of files take seconds
        manager, unknown = _look(names, include_path=str(folder), include_defaults=False)
    if unknown:
        manager, unknown = _look(names, include_path=None if folder is None else str(folder))
    if unknown:
        remedy = "`lm-eval ls tasks` lists the harness's own; --tasks-dir names a folder with others."
        raise bad_value("--tasks", listing(unknown), "names of tasks", remedy)
    try:
        manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # of several libraries: no network, no such dataset, no such file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"--tasks {','.join(names)}: its data cannot be had ({reason}). Fetch it once where there is a network, or "
            "write a task on files of your own (docs/evaluation.md)."
        ) from error
    return manager


def _look(names: Sequence[str], **where: Any) -> tuple[Any, list[str]]:
    """A list of tasks, and the names that it does not have."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(**where)
    return manager, [name for name in names if not manager.match_tasks([name])]


def score_tasks(
    model: Any, tokenizer: Any, manager: Any, names: Sequence[str], batch_size: int, limit: int, as_chat: bool
) -> list[TaskScore]:
    """What the harness makes of a model; the same on all ranks (collective).

    Args:
        model: whole, on this rank's device
        tokenizer: of the model
        manager: of `find_tasks`
        names: as of `find_tasks`
        batch_size: requests that go through the model at once
        limit: documents of a task at most; 0 for all
        as_chat: prompts are put into the chat template
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=_harness_model(model, tokenizer, batch_size),
        tasks=manager.match_tasks(list(names)),
        limit=limit or None,
        log_samples=False,
        apply_chat_template=as_chat,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    scores = [] if found is None else [vars(score) for score in _scores(found["results"])]
    return [TaskScore(**score) for score in comm.broadcast_object(scores)]


def _scores(results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    scores = []
    for task, numbers in results.items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            known = float(error) if isinstance(error, int | float) else math.nan
            scores.append(TaskScore(task, label, float(value), known))
    return scores


def _harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness's model for transformers, with the ranks of this run."""

        def __init__(self) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            self._rank, self._world_size = comm.rank(), comm.world_size()

        def all_gather(self, tensor: Tensor) -> Tensor:
            """One number of every rank."""
            return torch.tensor(comm.all_gather_numbers(tensor.reshape(-1))).flatten().to(tensor.dtype)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            """Every rank's object on rank 0."""
            assert dst == 0, "the harness gathers on rank 0"
            everyone = comm.gather_objects(as_json(obj))
            return None if everyone is None else [from_json(one) for one in everyone]

        def barrier(self) -> None:
            """Wait for all ranks."""
            comm.barrier()

    log = logging.getLogger("lm_eval.models.huggingface")
    own = log.level
    log.setLevel(logging.ERROR)  # it warns of ranks and models that it was not given by name; here they are as it wants
    try:
        return Model()
    finally:
        log.setLevel(own)


def as_json(value: Any) -> Any:
    """An object of dictionaries with any keys, lists, tuples, texts and numbers, with JSON's types alone."""
    if isinstance(value, dict):
        return {"dict": [[as_json(key), as_json(one)] for key, one in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [as_json(one) for one in value]}
    if isinstance(value, list):
        return [as_json(one) for one in value]
    return value if value is None or isinstance(value, str | int | float) else value.item()  # a number of numpy


def from_json(value: Any) -> Any:
    """What `as_json` was given."""
    if isinstance(value, list):
        return [from_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(from_json(one) for one in value["tuple"])
    return {from_json(key): from_json(one) for key, one in value["dict"]}
