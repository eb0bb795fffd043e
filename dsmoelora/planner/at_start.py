"""What a run is told of its memory before anything is loaded."""

from __future__ import annotations

import logging
from typing import Any

from deepspeed.accelerator import get_accelerator

from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError, UserError
from dsmoelora.parallel import comm
from dsmoelora.planner.devices import GIB
from dsmoelora.planner.memory import MemoryPlan, Phase, plan_memory

logger = logging.getLogger(__name__)


def notes_on_memory(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> list[str]:
    """What rank 0 has to say of the memory of a run, on rank 0 (collective).

    It plans for all ranks, whose devices are taken to be as large as its own: a plan takes a processor for seconds, and
    a machine has fewer of these than ranks have libraries to load.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Raises:
        UserError: the run cannot fit; on all ranks
    """
    return comm.together(lambda: check_memory(recipe, deepspeed, world_size) if comm.rank() == 0 else [])


def check_memory(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> list[str]:
    """Plan the memory of a run for this rank's accelerator; on a CPU nothing is looked at.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Returns:
        A warning, where it may not fit.

    Raises:
        ConfigError: what is exact of the plan alone takes more than the device has
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return []
    try:
        plan = plan_memory(recipe, deepspeed, world_size)
    except UserError:
        raise
    except Exception as error:  # a model's own code need not run without weights, and may train all the same
        logger.debug("The run's memory cannot be planned.", exc_info=error)
        return []
    return judge(plan, accelerator.total_memory())


def judge(plan: MemoryPlan, room: int) -> list[str]:
    """As `check_memory`.

    Args:
        plan: of a rank
        room: bytes of its device
    """
    remedy = "launch/plan.py lists all parts, and what makes each smaller."
    if plan.certain > room:
        raise ConfigError(
            f"The run cannot fit: what is exact of its plan takes {plan.certain / GIB:.1f} GiB of a device that has "
            f"{room / GIB:.1f} GiB. {remedy}"
        )
    if plan.peak <= room:
        return []
    parts = [part for part in plan.parts if part.phase in (Phase.ALWAYS, plan.peak_phase) and not part.on_host]
    largest = max((part for part in parts if not part.is_exact), key=lambda part: part.num_bytes)
    return [
        f"The run may not fit: its plan takes {plan.peak / GIB:.1f} GiB of a device that has {room / GIB:.1f} GiB. Of "
        f"these {largest.name}, {largest.num_bytes / GIB:.1f} GiB, is estimated. {remedy}"
    ]
