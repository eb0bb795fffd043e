"""The short form of a plan, for `launch/train.py --dry-run`."""

from __future__ import annotations

import logging
from typing import Any

from dsmoelora.config import Recipe
from dsmoelora.errors import UserError
from dsmoelora.planner.devices import GIB, Device
from dsmoelora.planner.memory import MemoryPlan, Phase, memory_of
from dsmoelora.planner.rehearsal import rehearse
from dsmoelora.planner.share_of_peak import device_of_run
from dsmoelora.planner.table import traffic_in_words
from dsmoelora.planner.time import time_of
from dsmoelora.planner.traffic import traffic_of
from dsmoelora.planner.verdict import largest_parts, moment, verdict

logger = logging.getLogger(__name__)


def short_plan(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> list[tuple[str, str]]:
    """Whether a run fits, what is largest, what it sends, and its time, for the device of `train.device`.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Returns:
        What, and how much of it; without a device neither a verdict nor times.

    Raises:
        UserError: recipe, DeepSpeed file and model cannot work together
    """
    device = device_of_run(recipe)
    try:
        run = rehearse(recipe, deepspeed, world_size)
        memory, traffic = memory_of(run), traffic_of(run)
    except UserError:
        raise
    except Exception as error:  # a model's own code need not run without weights, and may train all the same
        logger.debug("The run cannot be planned.", exc_info=error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [("memory of a rank", f"cannot be planned: the model does not run without weights ({reason})")]
    rows = [("memory of a rank", _fits(memory, device)), ("of it", _parts(memory))]
    if traffic:
        rows.append(("sent in a step", traffic_in_words(traffic, device)))
    if device is not None:
        time = time_of(run, device)
        speed = f"{time.step:.3g} s, bound by {time.bound}; {time.tokens_per_second:,.0f} tokens/s"
        rows.append(("time of a step", f"{speed}; {time.run_hours:.1f} hours in all, on {world_size} x {device.name}"))
    return rows


def _fits(memory: MemoryPlan, device: Device | None) -> str:
    if device is not None:
        return verdict(memory, device).text
    at = moment(memory.peak_phase)
    return f"{memory.peak / GIB:.2f} GiB {at}, context and libraries aside (train.device says whether that fits)"


def _parts(memory: MemoryPlan) -> str:
    shown = [f"{part.name} {part.num_bytes / GIB:.2f} GiB" for part in largest_parts(memory)]
    on_host = max(memory.total(phase, on_host=True) for phase in Phase)
    return "; ".join([*shown, f"and {on_host / GIB:.2f} GiB of the host's memory"] if on_host else shown)
