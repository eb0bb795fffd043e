"""The only room that knows ZeRO's internals.

Checked against deepspeed 0.19.4 to 0.19.8, in `runtime`: `zero/stage3.py`, `zero/stage_1_and_2.py`,
`bf16_optimizer.py`, `zero/partition_parameters.py`, `fp16/loss_scaler.py`, `engine.py`.
Everything private that the project uses is used here and looked at before it is trusted. What a version lacks is
refused by name; a version that nobody has read must show that its partitions hold what we take them to hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError
from dsmoelora.optim.rows import Segment, Shard, Trainable
from dsmoelora.parallel import comm, loss_scale
from dsmoelora.parallel.buckets import gather_pieces, in_buckets
from dsmoelora.parallel.placement import ExpertPlacement, check_placement
from dsmoelora.parallel.versions import KNOWN_VERSIONS, is_known_version

logger = logging.getLogger(__name__)

# What is read of the optimizer that DeepSpeed makes for a stage.
_READ: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer_Stage3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_process_groups",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    BF16_Optimizer: ("bf16_groups", "fp32_groups_flat_partition", "real_dp_process_group", "update_lp_params"),
    DeepSpeedZeroOptimizer: (
        *("round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups"),
        *("real_dp_process_group", "update_lp_params", "cpu_offload", "overflow", "averaged_gradients"),
    ),
}


@dataclass(frozen=True)
class Partition:
    """What this rank holds of the trainable tensors that ZeRO strings together in one process group.

    Args:
        trainables: all that lie in it, in ZeRO's order
        shard: the flat fp32 memory of this rank, and what its numbers are
        process_group: of the ranks among which it is cut
    """

    trainables: list[Trainable]
    shard: Shard
    process_group: Any


def _expect(holds: bool, otherwise: str) -> None:
    """Go on only with a DeepSpeed that does as this file believes.

    Raises:
        ConfigError: it does not
    """
    if not holds:
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} works in another way than its ZeRO optimizers did in "
            f"{KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}: {otherwise}. pip install deepspeed=={KNOWN_VERSIONS[-1]}"
        )


def _check_internals(optimizer: Any) -> None:
    kind = next((kind for kind in _READ if isinstance(optimizer, kind)), None)
    _expect(kind is not None, f"a {type(optimizer).__name__} steps")
    for name in _READ[kind] if kind else ():
        _expect(hasattr(optimizer, name), f"{type(optimizer).__name__} has no {name}")


def _check_values(
    read: list[Partition], found: Iterable[tuple[Trainable, nn.Parameter]], placement: ExpertPlacement
) -> None:
    """Whether the masters, where we believe each number to lie, are the model's parameters (collective).

    Raises:
        ConfigError: they are not, on any rank
    """
    segments = [(segment, each.shard.tensor.detach()) for each in read for segment in each.shard.segments]
    wrong = False
    for trainable, parameter in found:
        first = placement.experts_of(trainable).start * math.prod(trainable.shape[1:])
        with gathered([parameter]):
            values = parameter.detach().flatten()
            for segment, flat in segments:
                if segment.of is trainable:
                    masters = flat[segment.span].to(values.device, values.dtype)
                    wrong |= not torch.equal(masters, values[segment.start - first : segment.stop - first])
    _expect(not comm.any_rank(wrong), "numbers lie elsewhere in its fp32 partitions")


def make_placement(recipe: Recipe) -> ExpertPlacement:
    """The placement of a run; makes the process groups at the first call for an `ep_size` (collective).

    Raises:
        ConfigError: experts or ranks do not divide by `parallel.ep_size`
    """
    check_placement(recipe, comm.world_size())
    placement = ExpertPlacement(recipe.adapter.num_in_layer, recipe.parallel.ep_size, comm.world_size(), comm.rank())
    if placement.ep_size == 1:
        return placement
    deepspeed_groups._create_expert_and_data_parallel(placement.ep_size)
    return ExpertPlacement(
        placement.num_experts,
        placement.ep_size,
        placement.world_size,
        placement.rank,
        deepspeed_groups._get_expert_parallel_group(placement.group_name),
        deepspeed_groups._get_expert_data_parallel_group(placement.group_name),
    )


def place_experts(found: Iterable[tuple[Trainable, nn.Parameter]], placement: ExpertPlacement) -> None:
    """Before `deepspeed.initialize`: have ZeRO-3 partition expert parameters over their expert-data-parallel group.

    These are the marks of DeepSpeed's own expert layers (`module_inject/auto_ep_layer.py`); with them stage 3
    partitions, averages over all ranks, and takes norms over the expert-parallel group too.
    """
    for trainable, parameter in found:
        if len(placement.experts_of(trainable)) < trainable.shape[0]:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = placement.group_name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = placement.group_name  # type: ignore[attr-defined]
            parameter.ds_zero_partition_process_group = placement.expert_data_group  # type: ignore[attr-defined]


def partitions(
    engine: deepspeed.DeepSpeedEngine, found: Sequence[tuple[Trainable, nn.Parameter]], placement: ExpertPlacement
) -> list[Partition]:
    """This rank's flat fp32 partitions under stages 1 to 3, in ZeRO's order (collective); see `shards.shard_groups`.

    Raises:
        ConfigError: this DeepSpeed works in another way than those we know
    """
    known = {id(parameter): trainable for trainable, parameter in found}
    optimizer = engine.optimizer
    _check_internals(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        read = list(_stage_3_partitions(optimizer, known, placement))
    elif isinstance(optimizer, BF16_Optimizer):
        read = list(_bf16_partitions(optimizer, known))
    else:
        read = list(_stage_2_partitions(optimizer, known))
    covered = [trainable.name for partition in read for trainable in partition.trainables]
    _expect(sorted(covered) == sorted(of.name for of in known.values()), "some trainable tensor is not optimised")
    process_groups = {id(partition.process_group) for partition in read}
    _expect(len(process_groups) == len(read), "a step comes in parts, two in one process group")
    if not is_known_version():
        logger.warning(
            "DeepSpeed %s is newer than what this release was tested with (%s to %s); its partitions are checked.",
            *(deepspeed.__version__, KNOWN_VERSIONS[0], KNOWN_VERSIONS[-1]),
        )
        _check_values(read, found, placement)
    return read


def _stage_3_partitions(
    optimizer: DeepSpeedZeroOptimizer_Stage3, known: dict[int, Trainable], placement: ExpertPlacement
) -> Iterator[Partition]:
    """Stage 3 cuts every parameter into equal pieces, pads the last, and strings a rank's own together.

    There are as many pieces as ranks in the parameter's process group. Segments count in the tensor of all experts.
    """
    for index, parameters in enumerate(optimizer.fp16_groups):
        flat, process_group = optimizer.fp32_partitioned_groups_flat[index], optimizer.sub_group_process_groups[index]
        trainables, segments, offset = [], [], 0
        for parameter in parameters:
            trainable = known[id(parameter)]
            experts = placement.experts_of(trainable)
            wanted_shape = (len(experts), *trainable.shape[1:])
            _expect(tuple(parameter.ds_shape) == wanted_shape, f"{trainable.name} has another shape")
            groups = {id(process_group), id(parameter.ds_process_group)}
            is_elsewhere = len(experts) < trainable.shape[0] and groups != {id(placement.expert_data_group)}
            _expect(not is_elsewhere, f"{trainable.name} is not in its expert-data-parallel group")
            first = experts.start * math.prod(trainable.shape[1:])
            piece = parameter.partition_numel()
            start = min(piece * parameter.ds_zero_partition_rank, parameter.ds_numel)
            stop = min(start + piece, parameter.ds_numel)
            if start < stop:
                segments.append(Segment(trainable, first + start, first + stop, offset))
            offset += piece
            trainables.append(trainable)
        _expect(offset == flat.numel(), "a flat partition is longer than its pieces")
        yield Partition(trainables, Shard(flat, segments), process_group)


def _stage_2_partitions(optimizer: DeepSpeedZeroOptimizer, known: dict[int, Trainable]) -> Iterator[Partition]:
    """Stages 1 and 2 string all parameters together, with gaps where aligned, and cut the whole into W pieces."""
    for index, parameters in enumerate(optimizer.round_robin_bit16_groups):
        flat, process_group = optimizer.single_partition_of_fp32_groups[index], optimizer.real_dp_process_group[index]
        offsets = optimizer.round_robin_bit16_offsets[index]
        yield _piece_of_a_string(parameters, offsets, flat, process_group, known)


def _bf16_partitions(optimizer: BF16_Optimizer, known: dict[int, Trainable]) -> Iterator[Partition]:
    """Stage 1 in bf16 strings all parameters together without gaps, and cuts the whole into W pieces."""
    for index, parameters in enumerate(optimizer.bf16_groups):
        flat, process_group = optimizer.fp32_groups_flat_partition[index], optimizer.real_dp_process_group[index]
        offsets = list(accumulate((parameter.numel() for parameter in parameters), initial=0))[:-1]
        yield _piece_of_a_string(parameters, offsets, flat, process_group, known)


def _piece_of_a_string(
    parameters: list[nn.Parameter], offsets: list[int], flat: Tensor, process_group: Any, known: dict[int, Trainable]
) -> Partition:
    """This rank's piece, as long as all others, of parameters that lie at these offsets."""
    first = dist.get_rank(group=process_group) * flat.numel()
    trainables, segments = [], []
    for parameter, offset in zip(parameters, offsets, strict=True):
        trainable = known[id(parameter)]
        start, stop = max(first - offset, 0), min(first + flat.numel() - offset, parameter.numel())
        if start < stop:
            segments.append(Segment(trainable, start, stop, offset + start - first))
        trainables.append(trainable)
    return Partition(trainables, Shard(flat, segments), process_group)


def push_master_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the model's parameters follow the fp32 masters, and pieces, after these were written to (collective)."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return  # the parameters are the masters
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    _gather_trained(engine)


@contextmanager
def _kept_whole(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """A step in the block leaves what ZeRO-3 keeps whole between steps whole: what is trained comes in few gathers.

    DeepSpeed lets go of all of it when a step begins, and gathers all of it when it ends, a collective for each tensor.
    But no step writes to what is frozen; so that stays where it is, and nothing of it is sent.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield
        return
    kept, optimizer.persistent_parameters = optimizer.persistent_parameters, []
    frozen = [(one, one.data) for one in kept if not one.requires_grad and _is_there(one)]
    try:
        yield
    finally:
        optimizer.persistent_parameters = kept
    for parameter, whole in frozen:
        if not _is_there(parameter) and _is_in_memory(parameter):
            parameter.data, parameter.ds_status = whole, ZeroParamStatus.AVAILABLE
    _gather_trained(engine)


def _gather_trained(engine: deepspeed.DeepSpeedEngine) -> None:
    """Gather what is trained and kept whole between steps, as much at once as is fetched ahead (collective)."""
    by_group: dict[tuple[int, torch.dtype], list[Any]] = {}
    others: list[Any] = []
    for parameter in engine.optimizer.persistent_parameters:
        if parameter.requires_grad and not _is_there(parameter):
            group, dtype = parameter.ds_process_group, parameter.ds_tensor.dtype
            is_cut = dist.get_world_size(group) > 1 and _is_in_memory(parameter)
            (by_group.setdefault((id(group), dtype), []) if is_cut else others).append(parameter)
    for of_group in by_group.values():
        for bucket in in_buckets(of_group, full_numel, engine.zero_prefetch_bucket_size()):
            wholes = gather_pieces([parameter.ds_tensor for parameter in bucket], bucket[0].ds_process_group)
            for parameter, whole in zip(bucket, wholes, strict=True):
                parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
    if others:
        others[0].all_gather(others)


def _is_there(parameter: Any) -> bool:
    """Whether it is whole on this rank."""
    return parameter.ds_status is ZeroParamStatus.AVAILABLE


def _is_in_memory(parameter: Any) -> bool:
    """Whether this rank's piece is, and not on NVMe."""
    return parameter.ds_tensor.status is PartitionedParamStatus.AVAILABLE


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in pieces."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], rewrite: bool = False) -> Iterator[None]:
    """Whole parameters inside the block, pieces again after it (collective).

    Args:
        parameters: partitioned or not
        rewrite: what all ranks write into them lasts; where ranks differ, rank 0 has the last word. Otherwise for
            reading only
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if rewrite else None):
        yield


def gather_joined_parameters(model: nn.Module) -> None:
    """Have what a layer's experts read of its router gathered for them too, before `initialize`."""
    for _, layer in adapted_layers(model):
        for parameter in layer.experts.joined_parameters:
            deepspeed.zero.register_external_parameter(layer.experts, parameter)


def held_piece(parameter: Any) -> tuple[Tensor, int]:
    """What this rank holds of a parameter: the memory, flat, and the place of its first number in the whole.

    It is empty where the parameter lies on NVMe.
    """
    if not is_partitioned(parameter):
        return parameter.detach().view(-1), 0
    piece = parameter.ds_tensor.detach().view(-1)
    return piece, piece.numel() * dist.get_rank(parameter.ds_process_group)


def forget_whole(parameter: Any) -> None:
    """Have a parameter that ZeRO-3 keeps whole beside its pieces gathered from them again when it is next read.

    One that a pass is using, which has ended half-way with an error, stays.
    """
    if is_partitioned(parameter) and _is_there(parameter) and not parameter.ds_active_sub_modules:
        parameter.partition()


def full_numel(parameter: Tensor) -> int:
    """How many numbers a parameter has, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def step(engine: deepspeed.DeepSpeedEngine) -> None:
    """`engine.step()` with one loss scale from its beginning to its end, and without a trace of a gradient it drops.

    Between the micro-batches of a step it counts them, and no more (collective).
    """
    is_last = engine.is_gradient_accumulation_boundary()
    with loss_scale.held(engine), _kept_whole(engine):
        engine.step()
    if is_last:  # between two steps DeepSpeed still says of the gradient before that it was not finite
        _forget_dropped_gradient(engine)


def _forget_dropped_gradient(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have the next gradient summed from 0 where the last one was not finite.

    With the optimizer on the host, stages 1 and 2 let go of the fp32 sum of 16-bit gradients in a step, but not in one
    that they skip: all further gradients would be added to what is not finite.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload and optimizer.overflow:
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None


@contextmanager
def own_accumulation(engine: deepspeed.DeepSpeedEngine) -> Iterator[Callable[[bool], None]]:
    """Inside the block one step may have as many micro-batches as it likes; outside nothing has counted them.

    The function that the block gets is called before each forward pass, with whether it is the last before the step.
    """
    micro_steps = engine.micro_steps
    try:
        yield engine.set_gradient_accumulation_boundary
    finally:
        engine.micro_steps = micro_steps
        engine.set_gradient_accumulation_boundary(None)


def step_was_applied(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last step went through; ZeRO drops a step whose gradient norm is not finite on any rank."""
    return bool(engine.was_step_applied())


def unchecked_grad_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Norm of the gradient that is about to be used where DeepSpeed does not look at it itself, the same on all ranks.

    Stage 0 takes any gradient; the other stages drop a step whose gradient is not finite. None for these.
    """
    if engine.zero_optimization():
        return None
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def global_grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last step's raw gradient, before clipping, over all ranks."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)
