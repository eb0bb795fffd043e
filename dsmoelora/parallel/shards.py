"""The optimizer's shards: what ZeRO has given this rank, what other ranks cut of the same rows, and how they sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import deepspeed.comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.optim.rows import ShardGroup, Trainable, rows_cut_by, whole
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.placement import ExpertPlacement


def shard_groups(
    engine: deepspeed.DeepSpeedEngine, found: Iterable[tuple[Trainable, nn.Parameter]], placement: ExpertPlacement
) -> list[ShardGroup]:
    """What each number of this rank's flat fp32 partitions is, by process group, in ZeRO's order (collective).

    Args:
        engine: from `deepspeed.initialize`
        found: every trainable tensor and its parameter
        placement: where experts lie

    Raises:
        ConfigError: this DeepSpeed works in another way than those we know
    """
    found = list(found)
    if not engine.zero_optimization():
        return [_replicated(found)]
    partitions = zero.partitions(engine, found, placement)
    of_factors = [
        segment for each in partitions for segment in each.shard.segments if segment.of.factor in (Factor.A, Factor.B)
    ]
    all_cuts = comm.all_gather_objects(rows_cut_by(of_factors))
    cut = sorted({(name, row) for one in all_cuts for name, row in one})
    return [_group(partition, cut, placement) for partition in partitions]


def _group(partition: zero.Partition, cut: list[tuple[str, int]], placement: ExpertPlacement) -> ShardGroup:
    """A partition with the rows of its factors that the border of some rank cuts.

    Args:
        partition: of this rank
        cut: tensor and row of every cut, in all groups
        placement: where experts lie
    """
    process_group = partition.process_group
    by_name = {of.name: of for of in partition.trainables if of.factor in (Factor.A, Factor.B)}
    is_expert_group = placement.ep_size > 1 and process_group is placement.expert_data_group
    experts = placement.local_experts if is_expert_group else None
    cut_rows = [
        (by_name[name], row)
        for name, row in cut
        # the same tensors have other experts in other groups
        if name in by_name and (experts is None or row // by_name[name].shape[1] in experts)
    ]
    num_ranks = dist.get_world_size(group=process_group)
    all_reduce = _all_reduce_in(process_group)
    return ShardGroup(partition.trainables, [partition.shard], cut_rows, all_reduce, experts, num_ranks)


def _replicated(found: list[tuple[Trainable, nn.Parameter]]) -> ShardGroup:
    """Stage 0: every rank holds and steps every parameter, with the averaged gradient."""
    shards = [whole(trainable, parameter, comm.world_size()) for trainable, parameter in found]
    return ShardGroup([trainable for trainable, _ in found], shards, num_ranks=comm.world_size())


def _all_reduce_in(process_group: Any) -> Callable[[Tensor], None] | None:
    """Sum over a process group in place; the optimizer's tensors may lie on the CPU, NCCL's must not."""
    if dist.get_world_size(group=process_group) == 1:
        return None

    def all_reduce(flat: Tensor) -> None:
        on_device = flat.to(get_accelerator().current_device_name())
        dist.all_reduce(on_device, group=process_group)
        if on_device is not flat:
            flat.copy_(on_device)

    return all_reduce
