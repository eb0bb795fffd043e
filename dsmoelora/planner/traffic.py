"""What a rank sends in an optimizer step: collectives, their sizes, and over which links their bytes go.

Bytes are those that a rank sends, by the formulas of a ring over the P ranks of a process group. A tensor of n bytes,
whole on one rank, takes

    all_gather, reduce_scatter    (P - 1) / P n
    all_reduce                    2 (P - 1) / P n
    broadcast                     n
    all_to_all                    (P - 1) / P n, straight to each of the others

Libraries may choose other ways (trees, several rings); those send no less in sum. What a rank writes to the disk that
all ranks share is no collective: `write`, all of its bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dsmoelora.adapters.contrastive.losses import NAMES
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import Recipe
from dsmoelora.parallel.buckets import in_buckets
from dsmoelora.planner.cut_rows import step_buffer_bytes
from dsmoelora.planner.gathering import gradients_in_order
from dsmoelora.planner.rehearsal import Rehearsal, num_moments, rehearse

Phase = Literal["forward", "backward", "step", "checkpoint"]
Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "write"]
_CPU = torch.device("cpu")
_FP32 = 4
_FP64 = _INT64 = 8
_WHOLE_MODEL_BUCKET = 500_000_000  # numbers: DeepSpeed's, where it reduces all gradients after the backward pass
_NUM_TOTALS, _NUM_REPORTED = 2, 3  # see `Engine.train_step` and `parallel.reports`
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
    if run.world_size == 1:
        return []
    found = [
        *_gathers(run),
        *_exchange(run),
        *_reductions(run),
        *_norms(run),
        *_of_the_step(run),
        *of_the_host(run),
        _checkpoint(run),
    ]
    return [one for one in found if one.messages]


def sent_bytes(op: Op, num_bytes: float, group_size: int) -> int:
    """What a rank sends of a tensor of so many bytes, by the formulas above."""
    if op in ("broadcast", "write"):
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
        if one.op == "write":
            continue
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


def _traffic(run: Rehearsal, what: str, phase: Phase, op: Op, sizes: list[int], num_ranks: int) -> Traffic:
    """Of collectives with so many bytes each, in a group of all ranks or in one of those with the same experts."""
    sent = sent_bytes(op, sum(sizes), num_ranks)
    return Traffic(what, phase, op, len(sizes) if num_ranks > 1 else 0, sent, num_ranks, run.world_size // num_ranks)


def _groups(run: Rehearsal) -> list[int]:
    """Ranks of the process groups over which ZeRO cuts: all ranks, or those with the same experts."""
    return sorted({one.num_pieces for one in run.shapes.parameters.values()}, reverse=True)


def _gathers(run: Rehearsal) -> list[Traffic]:
    """Weights that ZeRO-3 gathers for each micro-batch, adapters that are not kept whole among them."""
    phases: dict[Phase, bool] = {"forward": False, "backward": True}
    found = []
    for phase, in_backward in phases.items():
        for num_ranks in _groups(run):
            of_group = (one for one in run.gathered.gathers if one.num_pieces == num_ranks)
            sizes = [one.numel * run.itemsize for one in of_group if one.in_backward == in_backward]
            what = "weights, gathered" if num_ranks == run.world_size else "experts, gathered"
            found.append(_traffic(run, what, phase, "all_gather", sizes * run.num_micro_batches, num_ranks))
    return found


def _exchange(run: Rehearsal) -> list[Traffic]:
    """Tokens on their way to the experts of other ranks, and back; see `stand_in_exchange`."""
    ep_size, times = run.recipe.parallel.ep_size, run.num_micro_batches
    if ep_size == 1:
        return []
    counts = sent_bytes("all_gather", 2 * _INT64 * ep_size, ep_size) * times
    found = [Traffic("numbers of tokens", "forward", "all_gather", times, counts, ep_size)]
    ops: list[Op] = ["all_gather", "all_to_all", "all_reduce"]
    for in_backward, op in ((late, op) for late in (False, True) for op in ops):
        messages, num_bytes = run.passed.sent.get((in_backward, op), (0, 0))
        phase: Phase = "backward" if in_backward else "forward"
        sent = sent_bytes(op, num_bytes * times, ep_size)
        found.append(Traffic("tokens of experts elsewhere", phase, op, round(messages) * times, sent, ep_size))
    return found


def _norms(run: Rehearsal) -> list[Traffic]:
    """For clipping, and flags that a gradient is not finite."""
    stage, dtype = run.zero.stage, run.recipe.model.dtype
    flags = {2: ("bf16", "fp16"), 3: ("fp16",)}.get(stage, ("fp16",))
    sizes = [1] if dtype in flags and stage else []
    if stage < 3:
        sizes += [] if stage == 1 and dtype == "bf16" else [_FP32]
        return [_traffic(run, "norms", "step", "all_reduce", sizes, run.world_size)]
    found = [_traffic(run, "norms", "step", "all_reduce", sizes, run.world_size)]
    found += [_traffic(run, "norms", "step", "all_reduce", [_FP64], num_ranks) for num_ranks in _groups(run)]
    if run.recipe.parallel.ep_size > 1:
        ep_size = run.recipe.parallel.ep_size
        sent = sent_bytes("all_reduce", _FP64, ep_size)
        found.append(Traffic("norms of experts", "step", "all_reduce", 1, sent, ep_size))
    return found


def _reductions(run: Rehearsal) -> list[Traffic]:
    """Gradients, in fp32: ZeRO 2 and 3 reduce those of each micro-batch, below it those of a step."""
    zero = run.zero
    op: Op = "reduce_scatter" if zero.stage == 3 and zero.reduce_scatter else "all_reduce"
    times = run.num_micro_batches if zero.stage >= 2 else 1
    found = []
    for num_ranks in _groups(run):
        sizes = [_FP32 * numel for numel, of_ranks in _buckets(run) if of_ranks == num_ranks]
        found.append(_traffic(run, "gradients", "backward", op, sizes * times, num_ranks))
    return found


def _buckets(run: Rehearsal) -> list[tuple[int, int]]:
    """Numbers that are reduced at once, and by how many ranks: `reduce_bucket_size` of one process group."""
    zero, is_bf16 = run.zero, run.recipe.model.dtype == "bf16"
    at_the_end = zero.stage == 0 or (zero.stage == 1 and (is_bf16 or not zero.overlap_comm))
    order = run.shapes.trained if at_the_end else gradients_in_order(run.shapes, run.passed.calls)
    room = _WHOLE_MODEL_BUCKET if zero.stage == 0 or (zero.stage == 1 and is_bf16) else zero.reduce_bucket_size
    padded = zero.stage == 3 and zero.reduce_scatter
    return [
        (sum(one.padded if padded else one.numel for one in bucket), num_ranks)
        for num_ranks, neighbours in itertools.groupby(order, key=lambda one: one.num_pieces)
        for bucket in in_buckets(neighbours, lambda one: one.numel, room)
    ]


def _of_the_step(run: Rehearsal) -> list[Traffic]:
    """What the optimizer step sends: sums of the preconditioner, norms, and the new weights."""
    found, stage = [], run.zero.stage
    for num_ranks in _groups(run):
        of_group = [one for one in run.shapes.trained if one.num_pieces == num_ranks]
        what = "adapters" if num_ranks == run.world_size else "experts"
        if stage and of_group:
            num_bytes = step_buffer_bytes(of_group, run.recipe.optim, run.num_cut_rows(of_group))
            sizes = [num_bytes] if num_bytes else []
            found.append(_traffic(run, f"preconditioner's sums of {what}", "step", "all_reduce", sizes, num_ranks))
        sizes = [numel * run.itemsize for numel in run.kept_buckets(num_ranks)]
        found.append(_traffic(run, f"{what} that are kept whole", "step", "all_gather", sizes, num_ranks))
    if stage in (1, 2):
        sizes = [run.string_numel * run.itemsize]
        found.append(_traffic(run, "adapters, new", "step", "all_gather", sizes, run.world_size))
    return found


def of_the_host(run: Rehearsal) -> list[Traffic]:
    """Few bytes, but messages that somebody waits for: sums of losses and routers, requests to stop, reports, norms."""
    num_sums = _NUM_TOTALS + len(RoutingLog(run.shapes.model, run.recipe.losses, _CPU).sums) + len(NAMES)
    sums = _traffic(run, "losses and routers' sums", "step", "all_reduce", [_FP64 * num_sums], run.world_size)
    stop = [_FP32] * run.num_micro_batches
    found = [sums, _traffic(run, "requests to stop", "forward", "all_reduce", stop, run.world_size)]
    if run.recipe.optim.preconditioner != "none":
        reports = [_NUM_REPORTED * _FP64 * run.world_size]
        found.append(_traffic(run, "preconditioner's reports", "step", "all_gather", reports, run.world_size))
    return found


def _checkpoint(run: Rehearsal) -> Traffic:
    """A rank's file: values and moments, and the factors' start."""
    num_bytes = run.own_numel * _FP32 * (1 + num_moments(run.recipe.optim)) + run.start_bytes
    return Traffic("checkpoint", "checkpoint", "write", 1, num_bytes, 1)
