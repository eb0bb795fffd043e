"""A plan in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoelora.planner.devices import GIB, Device
from dsmoelora.planner.memory import MemoryPlan, Phase
from dsmoelora.planner.verdict import verdict

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
