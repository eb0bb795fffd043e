"""A plan in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoelora.planner.devices import GIB, Device
from dsmoelora.planner.memory import MemoryPlan, Phase
from dsmoelora.planner.search import Candidate, Search
from dsmoelora.planner.time import Bound, TimePlan
from dsmoelora.planner.verdict import verdict

_NUM_BEST = 5
_NOT_SEARCHED = (
    "data.packing, which decides how full rows are: plans take all rows as full",
    "other global batches (train.batch_size), lengths, targets and ranks of experts, which change what is learned",
    "other buckets and thresholds than those of the DeepSpeed files",
)
_WHEN = {Phase.ALWAYS: "", Phase.LOAD: "while loading", Phase.PASS: "forward, backward", Phase.STEP: "optimizer step"}


def print_memory(plan: MemoryPlan, device: Device, world_size: int, console: Console) -> None:
    """Print all parts, whether they fit, what limits, and what is not counted."""
    table = Table(title=f"Memory of a rank: {world_size} x {device.name}", box=box.SIMPLE_HEAD)
    for name in ("part", "GiB", "", "when"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for part in plan.parts:
        how = ("exact" if part.is_exact else "estimated") + (", host" if part.on_host else "")
        table.add_row(part.name, f"{part.num_bytes / GIB:.3f}", how, _WHEN[part.phase])
    table.add_row("context, libraries, NCCL", f"{device.context_gib:.3f}", "assumed", "")
    console.print(table)
    found = verdict(plan, device)
    console.print(Text(found.text, style="bold green" if found.fits else "bold red"), soft_wrap=True)
    on_host = max(plan.total(phase, on_host=True) for phase in Phase)
    if on_host:
        node = on_host * min(device.ranks_per_node, world_size)
        console.print(f"host memory: {on_host / GIB:.1f} GiB a rank, {node / GIB:.1f} GiB a node", soft_wrap=True)
    for limit in found.limits:
        console.print(Text(f"largest: {limit}"), soft_wrap=True)
    for what in plan.left_out:
        console.print(Text(f"left out: {what}"), soft_wrap=True)


def print_time(plan: TimePlan, device: Device, price: float | None, console: Console) -> None:
    """Print a step's phases, what it waits for, speed, time and cost of the run.

    Args:
        plan: of the run
        device: of each rank
        price: of a device for an hour; None where nobody has said
        console: where it goes
    """
    table = Table(title=f"Seconds of a step: {plan.world_size} x {device.name}", box=box.SIMPLE_HEAD)
    for name in ("phase", "in all", "products", "memory", "launches", "network", "of it beside"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in plan.phases:
        figures = (phase.seconds, phase.compute, phase.memory, phase.launch, phase.network, phase.beside)
        table.add_row(phase.name, *(f"{seconds:.3f}" for seconds in figures))
    console.print(table)
    waits = plan.waits()
    shares = ", ".join(f"{bound} {100 * waits[bound] / plan.step:.0f} %" for bound in Bound)
    bound = f"{plan.step:.3f} s a step, bound by {plan.bound} (it waits for {shares})"
    console.print(Text(bound, style="bold"), soft_wrap=True)
    hours = f"{plan.run_hours:.1f} hours for {plan.num_steps:,} steps"
    if price is not None:
        hours += f", {plan.cost(price):,.0f} at {price:g} a device and hour"
    speed = f"{plan.tokens_per_second:,.0f} tokens/s, mfu {100 * plan.mfu:.1f}%; {hours}"
    console.print(Text(speed), soft_wrap=True)
    console.print(Text(f"assumed: {_assumptions(device)}; full rows"), soft_wrap=True)
    for what in plan.left_out:
        console.print(Text(f"left out: {what}"), soft_wrap=True)


def print_search(search: Search, best: list[Candidate], console: Console) -> None:
    """Print the best few choices, why, and the words that choose them."""
    title = f"The best of {search.num_planned} choices: {search.device.name}, cheapest first"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("", "ranks", "DeepSpeed", "rows", "s a step", "tokens/s", "mfu", "hours"):
        table.add_column(name, justify="left" if name == "DeepSpeed" else "right", no_wrap=True)
    shown = best[:_NUM_BEST]
    for place, one in enumerate(shown, 1):
        choice, time = one.choice, one.time
        row = (str(place), str(choice.world_size), Path(choice.deepspeed).name, str(choice.micro_batch_size))
        speed = (f"{time.step:.2f}", f"{time.tokens_per_second:,.0f}")
        table.add_row(*row, *speed, f"{100 * time.mfu:.1f}%", f"{time.run_hours:.1f}")
    console.print(table)
    for place, one in enumerate(shown, 1):
        console.print(Text(f"{place}: {one.reasons()}"), soft_wrap=True)
        console.print(Text(f"   {one.choice.overrides()}"), soft_wrap=True)
    if not best:
        console.print(Text("nothing fits", style="bold red"), soft_wrap=True)
    for reason, count in search.refused.items():
        console.print(Text(f"refused, {count} of them: {reason}"), soft_wrap=True)
    for what in _NOT_SEARCHED:
        console.print(Text(f"not looked at: {what}"), soft_wrap=True)


def _assumptions(device: Device) -> str:
    share = device.efficiency
    return (
        f"{share.compute:g} of {device.peak_tflops:g} TFLOP/s in {device.dtype}, {share.memory:g} of "
        f"{device.memory_gbs:g} GB/s of memory, {share.network:g} of the links, {device.launch_us:g} us a launch"
    )
