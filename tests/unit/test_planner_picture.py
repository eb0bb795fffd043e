"""The picture of a plan: bars as wide as what they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from dsmoelora.planner import MemoryPlan, Part, Phase, PhaseTime, TimePlan, device_named
from dsmoelora.planner.devices import GIB
from dsmoelora.planner.picture import draw_plan, memory_bars

DEVICE = device_named("a100-40")  # 1.5 GiB of which are assumed to be taken
MEMORY = MemoryPlan(
    [
        Part("base, partitioned", 10 * GIB),
        Part("largest tensor, whole", 2 * GIB, Phase.LOAD),
        Part("activations, kept", 4 * GIB, Phase.PASS, is_exact=False),
        Part("masters, fp32", 0.01 * GIB),
        Part("moments, fp32", 0.02 * GIB),
        Part("base, on the host", 50 * GIB, on_host=True),
    ],
    [],
)
FORWARD = PhaseTime("forward", compute=3, memory=1, launch=2, network=5, beside=3)
STEP = PhaseTime("step", compute=0, memory=0.5, launch=0, network=0.25)
TIME = TimePlan([FORWARD, STEP], tokens=1000, mfu=0.3, num_steps=10, world_size=8, left_out=[])


def test_parts_by_phase() -> None:
    """While loading, in the passes, in the step; what is small is one part, what lies with the host is none."""
    bars = memory_bars(MEMORY, DEVICE)
    assert bars["base, partitioned"] == [10, 10, 10]
    assert bars["largest tensor, whole"] == [2, 0, 0]
    assert bars["activations, kept"] == [0, 4, 0]
    assert bars["all smaller parts"] == pytest.approx([0.03, 0.03, 0.03])
    assert bars["context, libraries, NCCL (assumed)"] == [1.5, 1.5, 1.5]
    assert len(bars) == 5


def ends_of_bars(axes: Any) -> list[float]:
    """Where the last bar of each row ends, the hidden ones left out."""
    solid = [bar for bar in axes.patches if bar.get_height() > 0.5]
    rows = sorted({round(bar.get_y(), 3) for bar in solid})
    return [max(bar.get_x() + bar.get_width() for bar in solid if round(bar.get_y(), 3) == row) for row in rows]


def test_bars_end_at_the_totals() -> None:
    upper, lower = draw_plan(MEMORY, TIME, DEVICE).axes
    totals = [MEMORY.total(phase) / GIB + 1.5 for phase in (Phase.LOAD, Phase.PASS, Phase.STEP)]
    assert ends_of_bars(upper) == pytest.approx(totals)
    assert ends_of_bars(lower) == pytest.approx([6, 0.75])  # forward: four beside three, and two that are waited for
    (limit,) = upper.lines
    assert limit.get_xdata()[0] == 39.4
    assert "bound by compute" in lower.get_xlabel()


def test_the_picture_says_whether_it_fits() -> None:
    figure = draw_plan(MEMORY, TIME, DEVICE)
    assert figure.get_suptitle().startswith("8 x a100-40: fits: 15.5 of 39.4 GiB (39 %)")
