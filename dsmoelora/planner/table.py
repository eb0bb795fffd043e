"""A plan in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoelora.planner.devices import GIB, MIB, Device
from dsmoelora.planner.memory import MemoryPlan, Phase
from dsmoelora.planner.search import Candidate, Search
from dsmoelora.planner.time import Bound, TimePlan
from dsmoelora.planner.traffic import Traffic, bytes_by_link
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
    console.print(Text(found.text, style="bold green" if found.fits else "bold red"))
    on_host = max(plan.total(phase, on_host=True) for phase in Phase)
    if on_host:
        node = on_host * min(device.ranks_per_node, world_size)
        console.print(f"host memory: {on_host / GIB:.1f} GiB a rank, {node / GIB:.1f} GiB a node")
    for limit in found.limits:
        console.print(Text(f"largest: {limit}"))
    for what in plan.left_out:
        console.print(Text(f"left out: {what}"))


def print_traffic(traffic: list[Traffic], device: Device, world_size: int, console: Console) -> None:
    """Print what a rank sends in a step, part by part, inside its node and to others.

    Args:
        traffic: from `traffic_of`; of one rank there is none
        device: of each rank
        world_size: W
        console: where it goes
    """
    if not traffic:
        return
    title = f"Sent by a rank in a step: {world_size} x {device.name}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("what", "when", "collective", "ranks", "messages", "MiB\nin a node", "MiB\nbetween"):
        table.add_column(name, justify="left" if name in ("what", "when", "collective") else "right")
    in_steps = [one for one in traffic if one.op != "write"]
    for one in in_steps:
        sent = map(_mebibytes, bytes_by_link([one], device.ranks_per_node))
        table.add_row(one.what, one.phase, one.op, str(one.group_size), f"{one.messages:,}", *sent)
    console.print(table)
    console.print(Text(traffic_in_words(traffic, device), style="bold"))
    for one in traffic:
        if one.op == "write":
            mebibytes = one.sent_bytes / MIB
            written = f"{mebibytes:.1f} MiB of a rank, {mebibytes * world_size:,.0f} MiB of all"
            console.print(f"a checkpoint: {written}")


def traffic_in_words(traffic: list[Traffic], device: Device | None) -> str:
    """All that a rank sends in a step.

    Args:
        traffic: from `traffic_of`
        device: of each rank; None where nobody knows how many share a machine
    """
    in_steps = [one for one in traffic if one.op != "write"]
    sent, messages = sum(one.sent_bytes for one in in_steps), sum(one.messages for one in in_steps)
    text = f"{sent / GIB:.2f} GiB of a rank in {messages:,} messages"
    if device is None:
        return text
    inside, between = bytes_by_link(in_steps, device.ranks_per_node)
    if not between:
        return f"{text}, all inside a node"
    crossing = sum(one.messages for one in in_steps if bytes_by_link([one], device.ranks_per_node)[1])
    return (
        f"{text}: {inside / GIB:.2f} GiB inside a node, {between / GIB:.2f} GiB to other nodes in {crossing:,} of them"
    )


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
    console.print(Text(bound, style="bold"))
    hours = f"{plan.run_hours:.1f} hours for {plan.num_steps:,} steps"
    if price is not None:
        hours += f", {plan.cost(price):,.0f} at {price:g} a device and hour"
    speed = f"{plan.tokens_per_second:,.0f} tokens/s, mfu {100 * plan.mfu:.1f}%; {hours}"
    console.print(Text(speed))
    console.print(Text(f"assumed: {_assumptions(device)}; full rows"))
    for what in plan.left_out:
        console.print(Text(f"left out: {what}"))


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
        console.print(Text(f"{place}: {one.reasons()}"))
        console.print(Text(f"   {one.choice.overrides()}"), soft_wrap=True)
    if not best:
        console.print(Text("nothing fits", style="bold red"))
    for reason, count in search.refused.items():
        console.print(Text(f"refused, {count} of them: {reason}"))
    for what in _NOT_SEARCHED:
        console.print(Text(f"not looked at: {what}"))


def _mebibytes(num_bytes: float) -> str:
    return "< 0.1" if 0 < num_bytes < MIB / 20 else f"{num_bytes / MIB:,.1f}"


def _assumptions(device: Device) -> str:
    share = device.efficiency
    return (
        f"{share.compute:g} of {device.peak_tflops:g} TFLOP/s in {device.dtype}, {share.memory:g} of "
        f"{device.memory_gbs:g} GB/s of memory, {share.network:g} of the links, {device.launch_us:g} us a launch"
    )
