"""What a rank sends in an optimizer step: collectives, their sizes, and over which links their bytes go.

Bytes are those that a rank sends, by the formulas of a ring over the P ranks of a process group. A tensor of n bytes,
whole on one rank, takes

    all_gather, reduce_scatter    (P - 1) / P n
    all_reduce                    2 (P - 1) / P n
    broadcast                     n
    all_to_all                    (P - 1) / P n, straight to each of the others

Libraries may choose other ways (trees, several rings); those send no less in sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dsmoelora.config import Recipe
from dsmoelora.planner.rehearsal import Rehearsal, rehearse

Phase = Literal["forward", "backward", "step", "checkpoint"]
Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
_TIMES: dict[Op, float] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that a rank takes part in.

    Args:
        what: they carry
        phase: of the step when they happen; `checkpoint` is for each checkpoint, not for each step
        op: the collective
        messages: collectives of a rank in a step
        sent_bytes: of a rank in a step, by the ring formula above
        group_size: P, ranks of the process group
        stride: from a rank of the group to the next; 1 for neighbours
    """

    what: str
    phase: Phase
    op: Op
    messages: int
    sent_bytes: int
    group_size: int
    stride: int = 1


def plan_traffic(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> list[Traffic]:
    """What a rank sends in an optimizer step.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Raises:
        UserError: recipe, DeepSpeed file and model cannot work together
    """
    return traffic_of(rehearse(recipe, deepspeed, world_size))


def traffic_of(run: Rehearsal) -> list[Traffic]:
    """The same of a run that is rehearsed already."""
    return [one for one in _gathers(run) if one.messages]


def sent_bytes(op: Op, num_bytes: float, group_size: int) -> int:
    """What a rank sends of a tensor of so many bytes, by the formulas above."""
    if op == "broadcast":
        return round(num_bytes)
    return round(_TIMES[op] * num_bytes * (group_size - 1) / group_size)


def bytes_by_link(traffic: Iterable[Traffic], ranks_per_node: int) -> tuple[float, float]:
    """Bytes that a rank sends to ranks of its own node, and to those of others, the mean over all ranks.

    A node holds consecutive ranks, and rings go through them in their order: of the m ranks of a group on a node the
    last alone sends to another node, all that it sends. A node with G ranks sends G times the second number.

    Args:
        traffic: of a step
        ranks_per_node: G
    """
    inside = between = 0.0
    for one in traffic:
        share = _share_between(one, ranks_per_node)
        inside += (1 - share) * one.sent_bytes
        between += share * one.sent_bytes
    return inside, between


def _share_between(one: Traffic, ranks_per_node: int) -> float:
    on_node = max(1, ranks_per_node // one.stride)
    if one.group_size <= on_node:
        return 0.0
    if one.op == "all_to_all":
        return (one.group_size - on_node) / (one.group_size - 1)
    return 1 / on_node


def _gathers(run: Rehearsal) -> list[Traffic]:
    """Weights that ZeRO-3 gathers for each micro-batch, adapters that are not kept whole among them."""
    phases: dict[Phase, bool] = {"forward": False, "backward": True}
    times = run.recipe.train.accumulation_steps(run.world_size)
    found = []
    for phase, in_backward in phases.items():
        for num_pieces in sorted({one.num_pieces for one in run.gathered.gathers}, reverse=True):
            sizes = [
                one.numel * run.itemsize
                for one in run.gathered.gathers
                if (one.in_backward, one.num_pieces) == (in_backward, num_pieces)
            ]
            what = "weights, gathered" if num_pieces == run.world_size else "experts, gathered"
            group = (num_pieces, run.world_size // num_pieces)
            sent = sent_bytes("all_gather", sum(sizes) * times, num_pieces)
            found.append(Traffic(what, phase, "all_gather", len(sizes) * times, sent, *group))
    return found
