"""A plan as a picture: what each part takes of a rank's memory, and what a step's phases wait for."""

from __future__ import annotations

from typing import Any

from dsmoelora.planner.devices import GIB, Device
from dsmoelora.planner.memory import MemoryPlan, Part, Phase
from dsmoelora.planner.time import Bound, TimePlan
from dsmoelora.planner.verdict import verdict

_PHASES = {Phase.LOAD: "while loading", Phase.PASS: "forward, backward", Phase.STEP: "optimizer step"}
_SMALL = 0.01  # of the largest bar: smaller parts are one
_REST, _CONTEXT = "all smaller parts", "context, libraries, NCCL (assumed)"
_GREYS = {_REST: "0.85", _CONTEXT: "0.65"}
_COLOURS = "petroff10"  # of matplotlib: tells ten apart, also for colour-blind eyes
_OF_BOUND = {Bound.COMPUTE: 0, Bound.MEMORY: 1, Bound.NETWORK: 2, Bound.LAUNCH: 4}


def draw_plan(memory: MemoryPlan, time: TimePlan, device: Device) -> Any:
    """A matplotlib figure: bars of memory for each phase with the device's limit, and bars of seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    figure.suptitle(f"{time.world_size} x {device.name}: {verdict(memory, device).text.split(';')[0]}", fontsize=11)
    _draw_memory(upper, memory, device)
    _draw_time(lower, time)
    return figure


def memory_bars(memory: MemoryPlan, device: Device) -> dict[str, list[float]]:
    """GiB of the device by part, in the order of `_PHASES`; what is small everywhere is one part."""
    found = {part.name: [_gib_in(part, phase) for phase in _PHASES] for part in memory.parts if not part.on_host}
    totals = [sum(column) for column in zip(*found.values(), strict=True)]
    small = [name for name, bars in found.items() if max(bars) < _SMALL * max(totals)]
    bars = {name: found[name] for name in found if name not in small}
    if small:
        bars[_REST] = [sum(column) for column in zip(*(found[name] for name in small), strict=True)]
    return bars | {_CONTEXT: [device.context_gib] * len(_PHASES)}


def _gib_in(part: Part, phase: Phase) -> float:
    return part.num_bytes / GIB if part.phase in (Phase.ALWAYS, phase) else 0.0


def _draw_memory(axes: Any, memory: MemoryPlan, device: Device) -> None:
    import matplotlib

    colours = matplotlib.color_sequences[_COLOURS]
    estimated = {part.name for part in memory.parts if not part.is_exact}
    left, labels = [0.0] * len(_PHASES), list(_PHASES.values())
    for place, (name, widths) in enumerate(memory_bars(memory, device).items()):
        hatch = "//" if name in estimated else None
        colour = _GREYS.get(name, colours[place % len(colours)])
        axes.barh(labels, widths, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(device.memory_gib, color="black", linestyle="--", linewidth=1.2)
    limit = f"{device.memory_gib:g} GiB"
    axes.annotate(limit, (device.memory_gib, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    axes.set_xlim(0, 1.04 * max(device.memory_gib, *left))
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a rank (hatched: estimated)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_time(axes: Any, time: TimePlan) -> None:
    import matplotlib

    colours = matplotlib.color_sequences[_COLOURS]
    left, labels = [0.0] * len(time.phases), [phase.name for phase in time.phases]
    for bound in Bound:
        widths = [phase.waits()[bound] for phase in time.phases]
        axes.barh(labels, widths, left=left, color=colours[_OF_BOUND[bound]], edgecolor="white", label=bound.value)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    hidden = [phase.beside for phase in time.phases]
    axes.barh(labels, hidden, height=0.2, color="none", edgecolor="black", label="communication beside it")
    axes.invert_yaxis()
    speed = f"{time.tokens_per_second:,.0f} tokens/s, mfu {100 * time.mfu:.1f}%"
    axes.set_xlabel(f"seconds of a step by what they wait for: {time.step:.3g} s, bound by {time.bound}; {speed}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=5, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
