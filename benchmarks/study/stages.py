"""What a cell adapts the model with, and from which step to which."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.study.cells import Cell, Task
from benchmarks.study.halving import budgets
from benchmarks.study.state import alone
from dsmoelora.config import AdapterConfig


@dataclass(frozen=True)
class Stage:
    """Steps with the same adapters and one optimizer.

    Args:
        adapter: what is trained
        begin, end: the first of its steps, and the first that is no longer
    """

    adapter: AdapterConfig
    begin: int
    end: int


def stages(cell: Cell, task: Task) -> list[Stage]:
    """One; or with `Arm.one_first` a quarter of the steps with one expert, and the others with copies of it.

    Steps, rows and rates go on as in a cell of one stage, so what the first expert learned from is in its budget.
    Routers and moments are new in the second stage.
    """
    adapter, end = cell.of.adapter_config(cell.seed), task.num_steps
    if not cell.of.one_first:
        return [Stage(adapter, 0, end)]
    middle, *_ = budgets(end)
    copies = replace(adapter, experts_from=[str(alone(cell.folder(task)))] * adapter.num_experts)
    return [Stage(adapter.plain(), 0, middle), Stage(copies, middle, end)]
