"""Planned beside measured, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planner.cells import Cells
from benchmarks.planner.rows import ROWS, write_shape
from dsmoelora.planner import Device, Phase, memory_of, rehearse, time_of, traffic_of
from dsmoelora.planner.rehearsal import Memo, Rehearsal

_MIB = 2**20


@dataclass(frozen=True)
class Pair:
    """A figure of a row.

    Args:
        planned: by the planner
        measured: here
    """

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Planned / measured; 1 where there is nothing of it."""
        return self.planned / self.measured if self.measured else 1.0 + bool(self.planned)


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Args:
        name: of `ROWS`
        at_rest: bytes of tensors between two steps
        peak: bytes of tensors at most
        resident: bytes of the process at most, without libraries
        sent: bytes of a step
        messages: collectives of a step
        step: seconds; None where they were not measured
    """

    name: str
    at_rest: Pair
    peak: Pair
    resident: float
    sent: Pair
    messages: Pair
    step: Pair | None

    @property
    def in_step(self) -> Pair:
        """What a step takes beside what is there at all times."""
        return Pair(self.peak.planned - self.at_rest.planned, self.peak.measured - self.at_rest.measured)


def lines_of(cells: Cells, folder: Path, names: Sequence[str]) -> list[Line]:
    """Those of the rows that were measured.

    Args:
        cells: that are there
        folder: where the models' shapes can be written
        names: of the rows
    """
    memo, found = Memo(), []
    for name in names:
        held, timed, row = cells.read(name, "held"), cells.read(name, "time"), ROWS[name]
        if held is None:
            continue
        run = rehearse(row.recipe(write_shape(row.shape, folder)), row.deepspeed(), row.ranks, memo)
        found.append(_line(name, run, held, timed))
    return found


def _line(name: str, run: Rehearsal, held: dict[str, Any], timed: dict[str, Any] | None) -> Line:
    memory, traffic = memory_of(run), [one for one in traffic_of(run) if one.op != "write"]

    def both(phase: Phase) -> float:
        """Of device and host, which are one here."""
        return memory.total(phase) + memory.total(phase, on_host=True)

    step = None
    if timed is not None:
        step = Pair(time_of(run, Device.of("here", timed["device"])).step, timed["seconds"])
    return Line(
        name,
        Pair(both(Phase.ALWAYS), held["at_rest"]),
        Pair(max(both(Phase.PASS), both(Phase.STEP)), held["peak"]),
        held["resident"],
        Pair(sum(one.sent_bytes for one in traffic), held["sent"]),
        Pair(sum(one.messages for one in traffic), held["messages"]),
        step,
    )


def table(lines: Sequence[Line]) -> list[str]:
    """In Markdown: sizes in MiB, seconds, and ratios of planned to measured."""
    heads = ["at rest, MiB", "peak, MiB", "of it in a step", "process, MiB", "sent, MiB", "messages", "step, s"]
    return [
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
        *(_shown(line) for line in lines),
    ]


def _shown(line: Line) -> str:
    messages = f"{line.messages.planned:.0f} / {line.messages.measured:.0f}"
    cells = [
        _of_bytes(line.at_rest),
        _of_bytes(line.peak),
        f"{line.in_step.ratio:.2f}",
        f"{line.resident / _MIB:,.0f}",
        _of_bytes(line.sent) if line.sent.measured else "-",
        messages if line.messages.measured else "-",
        "" if line.step is None else f"{line.step.planned:.2f} / {line.step.measured:.2f} = {line.step.ratio:.2f}",
    ]
    return f"| {line.name} | " + " | ".join(cells) + " |"


def _of_bytes(pair: Pair) -> str:
    return f"{pair.planned / _MIB:,.1f} / {pair.measured / _MIB:,.1f} = {pair.ratio:.3f}"


def summary(lines: Sequence[Line]) -> str:
    """How far the ratios are apart."""
    ratios = {
        "peak": [line.peak.ratio for line in lines],
        "sent": [line.sent.ratio for line in lines if line.sent.measured],
        "step": [line.step.ratio for line in lines if line.step],
    }
    parts = (
        f"{what}: median {statistics.median(some):.3f}, {min(some):.3f} to {max(some):.3f}"
        for what, some in ratios.items()
        if some
    )
    return "planned / measured, " + "; ".join(parts)
