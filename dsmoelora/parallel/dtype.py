"""Which dtype a run computes in, where the recipe leaves it to the machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config import Recipe
from dsmoelora.config.dtype import SLOWER_WITHOUT_BF16, DtypeName, has_bf16, instruction_set
from dsmoelora.parallel import comm


@dataclass(frozen=True)
class Settled:
    """A recipe that says which dtype.

    Args:
        recipe: as it came, with a dtype in place of `auto`
        why: the dtype and the reason
        notes: what a user should know of it
    """

    recipe: Recipe
    why: str
    notes: list[str] = field(default_factory=list)


def settle_dtype(recipe: Recipe, before: DtypeName | None = None) -> Settled:
    """Put the dtype that all ranks can compute in for `model.dtype: auto` (collective).

    Args:
        recipe: of the run
        before: the dtype of the run that is gone on with, which `auto` keeps; None for a new one
    """
    asked, device = recipe.model.dtype, torch.device(get_accelerator().device_name())
    everywhere = not comm.any_rank(not has_bf16(device))
    dtype: DtypeName
    if asked != "auto":
        dtype, why = asked, "as model.dtype says"
    elif before is not None:
        dtype, why = before, "as the run began"
    else:
        dtype, why = "bf16" if everywhere else "fp32", _reason(device, everywhere)
    notes = []
    if before not in (None, dtype):
        notes.append(f"the run began in {before} and goes on in {dtype}, as model.dtype says.")
    if dtype == "bf16" and device.type == "cpu" and not everywhere:
        notes.append(
            f"model.dtype is bf16, but this CPU ({instruction_set()}) has no instructions for it: matrix products take "
            f"{SLOWER_WITHOUT_BF16} as long as in fp32. Set model.dtype to auto or fp32."
        )
    settled = replace(recipe, model=replace(recipe.model, dtype=dtype))
    return Settled(settled, f"{dtype}, {why}", notes)


def _reason(device: torch.device, everywhere: bool) -> str:
    name = f"this CPU ({instruction_set()})" if device.type == "cpu" else f"this accelerator ({device.type})"
    if everywhere:
        return f"for {name} has bf16"
    return f"for {name} has no bf16" if not has_bf16(device) else "for another rank's machine has no bf16"
