"""Whether a plan fits a device, and what to change where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoelora.planner.devices import GIB, Device
from dsmoelora.planner.memory import MemoryPlan, Part, Phase

_TIGHT = 0.9  # of the device: what is estimated, and what is left out, may take the rest
_NUM_LARGEST = 3
_REMEDIES = {
    "base, whole": "cut the base: ds_configs/zero3.json",
    "base, partitioned": "more ranks, or ds_configs/zero3_offload.json",
    "base, gathered": "smaller stage3_max_live_parameters and stage3_max_reuse_distance",
    "base, kept whole": "smaller stage3_param_persistence_threshold",
    "adapters, whole": "cut them: ds_configs/zero3.json",
    "adapters, kept whole": "smaller stage3_param_persistence_threshold",
    "masters, fp32": "more ranks, or offload_optimizer",
    "moments, fp32": "more ranks, or offload_optimizer",
    "start of the factors": "more ranks, or offload_optimizer",
    "reduce bucket": "smaller reduce_bucket_size (ds_configs/zero3.json has 20 million)",
    "activations, kept": "train.activation_checkpointing: true, or a smaller train.micro_batch_size",
    "inputs of the layers, kept": "smaller train.micro_batch_size or data.max_length",
    "activations, at work": "smaller train.micro_batch_size, data.max_length or train.loss_chunk",
}


@dataclass(frozen=True)
class Verdict:
    """What a plan comes to on a device.

    Args:
        used: share of the device's memory at the worst moment, its context counted
        fits: it is below 1
        is_tight: but not by much
        is_certain: what is exact alone does not fit
        text: a sentence that says so
        limits: the largest parts of that moment, with what makes each smaller
    """

    used: float
    fits: bool
    is_tight: bool
    is_certain: bool
    text: str
    limits: list[str]


def verdict(plan: MemoryPlan, device: Device) -> Verdict:
    """Whether a plan fits a device."""
    room = device.memory_gib * GIB
    used, certain = (num_bytes + device.context_gib * GIB for num_bytes in (plan.peak, plan.certain))
    share = used / room
    most = f"{used / GIB:.1f} of {device.memory_gib:g} GiB ({100 * share:.0f} %) {moment(plan.peak_phase)}"
    if certain > room:
        text = f"does not fit, for certain: what is exact alone takes {certain / GIB:.1f} GiB; in all {most}"
    elif share > 1:
        text = f"does not fit, by what is estimated: {most}"
    elif share > _TIGHT:
        text = f"fits, but tightly: {most}; what a plan leaves out may be more than the rest"
    else:
        text = f"fits: {most}"
    return Verdict(
        share, share <= 1, _TIGHT < share <= 1, certain > room, text, [_limit(part) for part in largest_parts(plan)]
    )


def moment(phase: Phase) -> str:
    """When most is there, in words."""
    return {Phase.LOAD: "while it is loaded", Phase.PASS: "in forward and backward", Phase.STEP: "in the step"}[phase]


def largest_parts(plan: MemoryPlan) -> list[Part]:
    """What takes most of the device at the worst moment."""
    there = [one for one in plan.parts if one.phase in (Phase.ALWAYS, plan.peak_phase) and not one.on_host]
    return sorted(there, key=lambda one: one.num_bytes, reverse=True)[:_NUM_LARGEST]


def _limit(part: Part) -> str:
    remedy = _REMEDIES.get(part.name, "")
    return f"{part.name}, {part.num_bytes / GIB:.2f} GiB" + (f": {remedy}" if remedy else "")
