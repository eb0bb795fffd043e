"""What travels between the ranks in the optimizer's step, and what its host waits for, counted as the engine trains."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsmoelora.optim.preconditioner import Preconditioner
from tests.engine_ranks import Job, batches_of, build_engine
from tests.host_waits import host_reads


@dataclass(frozen=True)
class Collective:
    """One call: its name in torch, the bytes of its tensors, and the ranks of its process group."""

    name: str
    num_bytes: int
    ranks: list[int]


class Collectives(TorchDispatchMode):
    """Records every collective of torch.distributed, whoever asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            num_bytes = sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.found.append(Collective(func.__name__, num_bytes, _ranks_of_group(args)))
        return func(*args, **(kwargs or {}))


def _ranks_of_group(args: Any) -> list[int]:
    objects = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
    group = next(each for each in objects if str(each._type()).endswith(".ProcessGroup"))
    return distributed.get_process_group_ranks(distributed.ProcessGroup.unbox(group))


@dataclass
class Counts:
    """What a rank has counted.

    Args:
        collectives: of each call of `step`
        reads: what its host waited for, in all calls of `step`
        num_applied: how often gradients were preconditioned
        reports: of each step
    """

    collectives: list[list[Collective]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    num_applied: int = 0
    reports: list[dict[str, float]] = field(default_factory=list)


def train_and_count(job: Job) -> Counts:
    engine, counts, recorders = build_engine(job), Counts(), ExitStack()

    def open_step(*_: Any) -> None:
        counts.collectives.append(recorders.enter_context(Collectives()).found)
        recorders.callback(counts.reads.extend, recorders.enter_context(host_reads()))

    def close_step(*_: Any) -> None:
        recorders.close()

    engine.optimizer.register_step_pre_hook(open_step)
    engine.optimizer.register_step_post_hook(close_step)
    finish = Preconditioner.finish
    with mock.patch.object(Preconditioner, "finish", autospec=True, side_effect=finish) as applied:
        for step in range(job.recipe.train.max_steps):
            counts.reports.append(engine.train_step(batches_of(job, step)).preconditioning)
        counts.num_applied = applied.call_count
    return counts
