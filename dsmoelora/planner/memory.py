"""Memory of a rank, part by part: exact where ZeRO allocates by rule, estimated where it depends on what runs when.

W ranks, b bytes of a number of the model's dtype. n numbers of a tensor take a rank ceil(n / W) under ZeRO-3, and the
pieces of tensors that only an expert-parallel group's peers share are as many as these peers. Stages 1 and 2 string all
trained tensors together, fill up to a multiple of 2 W, and cut the string into W pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.four_bit import packed_layers
from dsmoelora.config import Recipe
from dsmoelora.planner.cut_rows import step_buffer_bytes
from dsmoelora.planner.rehearsal import Rehearsal, num_moments, rehearse
from dsmoelora.planner.shapes import ParameterShape
from dsmoelora.planner.worst_moment import Moment, worst_moment

_FP32 = 4


class Phase(Enum):
    """When a part is there."""

    ALWAYS = "always"
    LOAD = "load"
    PASS = "pass"
    STEP = "step"


@dataclass(frozen=True)
class Part:
    """What one thing takes of a rank.

    Args:
        name: of the thing
        num_bytes: of it
        phase: when it is there
        is_exact: it follows from sizes and rules alone
        on_host: it lies in the host's memory
    """

    name: str
    num_bytes: float
    phase: Phase = Phase.ALWAYS
    is_exact: bool = True
    on_host: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """All parts of a rank, those of no bytes left out.

    Args:
        parts: in the order in which they are shown
        left_out: what is not counted
    """

    parts: list[Part]
    left_out: list[str]

    def total(self, phase: Phase, on_host: bool = False, exact_only: bool = False) -> float:
        """Bytes in a phase, with what is always there."""
        return sum(
            part.num_bytes
            for part in self.parts
            if part.phase in (Phase.ALWAYS, phase) and part.on_host == on_host and (part.is_exact or not exact_only)
        )

    @property
    def peak_phase(self) -> Phase:
        """In which the device holds most."""
        return max((Phase.LOAD, Phase.PASS, Phase.STEP), key=self.total)

    @property
    def peak(self) -> float:
        """Bytes of the device at the worst moment."""
        return self.total(self.peak_phase)

    @property
    def certain(self) -> float:
        """Bytes of the device that are certain at the worst moment."""
        return max(self.total(phase, exact_only=True) for phase in Phase)


def plan_memory(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> MemoryPlan:
    """The memory of the first rank of a run; no other has more, but for the last row of a tensor.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Raises:
        UserError: recipe, DeepSpeed file and model cannot work together
    """
    return memory_of(rehearse(recipe, deepspeed, world_size))


def memory_of(run: Rehearsal) -> MemoryPlan:
    """The same of a run that is rehearsed already."""
    parts = [
        *_base_parts(run),
        _noise_part(run),
        *_adapter_parts(run),
        *_optimizer_parts(run),
        *_gradient_parts(run),
        *_pass_parts(run),
    ]
    return MemoryPlan([part for part in parts if part.num_bytes], _left_out(run.recipe))


def _whole(parameters: Iterable[ParameterShape]) -> int:
    return sum(one.numel for one in parameters)


def _pieces(parameters: Iterable[ParameterShape]) -> int:
    return sum(one.piece for one in parameters)


def _kept(parameters: Iterable[ParameterShape]) -> int:
    """Numbers of whole tensors that stay beside the pieces; with one rank they are the same memory."""
    return sum(one.padded for one in parameters if one.is_kept_whole and one.num_pieces > 1)


def _base_parts(run: Rehearsal) -> list[Part]:
    shapes, stage, itemsize, frozen = run.shapes, run.zero.stage, run.itemsize, run.shapes.frozen
    as_read = [math.prod(layer.shape) for layer in packed_layers(shapes.model).values()]
    largest = max(one.numel for one in frozen)
    buffers = Part("buffers of the base", shapes.buffer_bytes)
    if stage < 3:
        return [Part("base, whole", _whole(frozen) * itemsize), buffers]
    away = run.offloads("offload_param")
    leaves = [one for one in frozen if not (away and one.is_kept_whole)]
    return [
        Part("base, partitioned", _pieces(leaves) * itemsize, on_host=away),
        Part("base, pieces of what is kept whole", (_pieces(frozen) - _pieces(leaves)) * itemsize),
        Part("base, kept whole", _kept(frozen) * itemsize),
        buffers,
        Part("largest tensor, whole", max(largest, *as_read, 0) * itemsize, Phase.LOAD),
    ]


def _noise_part(run: Rehearsal) -> Part:
    """What `optim.flat_noise` puts aside where the weight lies."""
    weights = [run.shapes.parameters[id(layer.base.weight)] for _, layer in adapted_layers(run.shapes.model)]
    numel = _pieces(weights) if run.zero.stage == 3 else _whole(weights)
    held = numel * run.itemsize if run.recipe.optim.flat_noise else 0
    return Part("weights under noise, put aside", held, on_host=run.offloads("offload_param"))


def _adapter_parts(run: Rehearsal) -> list[Part]:
    stage, itemsize, trained = run.zero.stage, run.itemsize, run.shapes.trained
    if stage == 0:
        return [Part("adapters, whole", _whole(trained) * itemsize)]
    if stage < 3:
        return [Part("adapters, whole", run.string_numel * itemsize)]
    away = run.offloads("offload_param")
    gathered = [numel for num_ranks in {one.num_pieces for one in trained} for numel in run.kept_buckets(num_ranks)]
    return [
        Part("adapters, partitioned", _pieces(trained) * itemsize, on_host=away),
        Part("adapters, kept whole", _kept(trained) * itemsize),
        Part("adapters, gathered after the step", max(gathered, default=0) * itemsize, Phase.STEP, is_exact=False),
    ]


def _optimizer_parts(run: Rehearsal) -> list[Part]:
    recipe, own, trained = run.recipe, run.own_numel, run.shapes.trained
    stage, away = run.zero.stage, run.offloads("offload_optimizer")
    groups = [[one for one in trained if one.num_pieces == ranks] for ranks in {one.num_pieces for one in trained}]
    buffer = sum(step_buffer_bytes(group, recipe.optim, run.num_cut_rows(group)) for group in groups)
    return [
        Part("masters, fp32", own * _FP32 if stage else 0, on_host=away),
        Part("moments, fp32", own * _FP32 * num_moments(recipe.optim), on_host=away),
        Part("start of the factors", run.start_bytes, on_host=away),
        Part("buffer of the preconditioner", buffer, on_host=away),
        Part("adapters, a copy for the host", own * run.itemsize if away and stage < 3 else 0, on_host=True),
    ]


def _gradient_parts(run: Rehearsal) -> list[Part]:
    away, phase = run.offloads("offload_optimizer"), Phase.ALWAYS if _gradients_stay(run) else Phase.STEP
    parts = [Part("gradients, fp32", _gradient_bytes(run), phase, on_host=away)]
    if not _gradients_stay(run):
        several = run.num_micro_batches > 1  # then they are there in the passes of all but the first
        so_far = _gradient_bytes(run) if several else _worst_moment(run).gradients
        parts.append(Part("gradients so far, fp32", so_far, Phase.PASS, is_exact=several))
    flattened = run.own_numel * _FP32 if run.zero.stage == 3 else 0
    needed = Phase.ALWAYS if away else Phase.STEP
    return [*parts, Part("gradients, flattened for the step", flattened, needed, on_host=away)]


def _gradients_stay(run: Rehearsal) -> bool:
    """Between steps; elsewhere they are there from the backward pass to the step alone."""
    stage = run.zero.stage
    is_stage_1_in_bf16 = stage == 1 and run.recipe.model.dtype == "bf16"
    return stage == 3 or run.offloads("offload_optimizer") or is_stage_1_in_bf16


def _gradient_bytes(run: Rehearsal) -> int:
    in_stage_1 = run.zero.stage == 1 and not run.offloads("offload_optimizer")
    return _FP32 * (run.string_numel if in_stage_1 else run.own_numel)


def _worst_moment(run: Rehearsal) -> Moment:
    come = 0 if _gradients_stay(run) or run.num_micro_batches > 1 else _gradient_bytes(run)
    return worst_moment(run.gathered, run.itemsize, run.passed.kept, come)


def _pass_parts(run: Rehearsal) -> list[Part]:
    zero, recipe, passed, worst = run.zero, run.recipe, run.passed, _worst_moment(run)
    bucket = zero.reduce_bucket_size * _FP32 if zero.stage and zero.contiguous_gradients else 0
    buckets = {1: 0 if recipe.model.dtype == "bf16" else 1, 2: 1}.get(zero.stage, 1)
    if zero.stage in (1, 2) and zero.overlap_comm:
        buckets *= 2
    kept = "inputs of the layers, kept" if recipe.train.activation_checkpointing else "activations, kept"
    return [
        Part("reduce bucket", bucket * buckets, Phase.ALWAYS if zero.stage == 3 else Phase.PASS),
        Part("base, gathered", worst.gathered, Phase.PASS, is_exact=False),
        Part(kept, worst.kept, Phase.PASS, is_exact=False),
        Part("activations, at work", passed.peak - passed.kept, Phase.PASS, is_exact=False),
    ]


def _left_out(recipe: Recipe) -> list[str]:
    notes = [
        "what an allocator rounds up or cannot use for fragments",
        "workspaces of kernels, and copies that a kernel makes for itself",
        "batches and their masks beyond the one at hand, the routers' sums, the tokenizer and the data (host)",
        "evaluation and answers to held-out prompts, which keep a key-value cache",
    ]
    if recipe.model.attention == "flash_attention_2":
        notes.append("flash_attention_2 is counted as sdpa")
    if recipe.adapter.init == "svd":
        notes.append("the singular value decompositions before the first step")
    return notes
