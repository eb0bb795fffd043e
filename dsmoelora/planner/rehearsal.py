"""What every part of a plan is made from: the recipe, the sizes of the model, one micro-batch without memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsmoelora.config import OptimConfig, Recipe
from dsmoelora.model import load_model_config, without_dropout
from dsmoelora.parallel.buckets import in_buckets
from dsmoelora.parallel.zero_config import merge_config, read_zero
from dsmoelora.planner.cut_rows import num_cut_rows
from dsmoelora.planner.gathering import Gathered, GatherRules, gathered_in_pass
from dsmoelora.planner.shapes import ModelShapes, ParameterShape, shapes_of
from dsmoelora.planner.stand_in import PassBytes, pass_bytes


@dataclass(frozen=True)
class Rehearsal:
    """A run as the first rank sees it.

    Args:
        recipe: with its dtype settled
        config: of DeepSpeed, from `merge_config`
        shapes: of the model
        passed: one micro-batch of full rows
    """

    recipe: Recipe
    config: dict[str, Any]
    shapes: ModelShapes
    passed: PassBytes

    @cached_property
    def zero(self) -> DeepSpeedZeroConfig:
        """The section `zero_optimization`."""
        return read_zero(self.config)

    def offloads(self, section: str) -> bool:
        """Whether `offload_param` or `offload_optimizer` lie with the host."""
        offload = getattr(self.zero, section)
        return offload is not None and offload.device != "none"

    @property
    def world_size(self) -> int:
        """W."""
        return self.shapes.placement.world_size

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model."""
        return self.recipe.model.torch_dtype.itemsize

    @property
    def num_micro_batches(self) -> int:
        """Of a rank in an optimizer step."""
        return self.recipe.train.accumulation_steps(self.world_size)

    @property
    def string_numel(self) -> int:
        """Numbers of all trained tensors behind one another, filled up, as stages 1 and 2 have them."""
        step = 2 * self.world_size
        return -(-sum(one.numel for one in self.shapes.trained) // step) * step

    @property
    def own_numel(self) -> int:
        """Trained numbers whose masters a rank has, padding counted."""
        trained = self.shapes.trained
        if self.zero.stage == 0:
            return sum(one.numel for one in trained)
        return sum(one.piece for one in trained) if self.zero.stage == 3 else self.string_numel // self.world_size

    @property
    def start_bytes(self) -> int:
        """Of what a rank keeps of the factors' start with `adapter.init: svd`: a number for each of its own."""
        return self.own_numel * self.itemsize if self.recipe.adapter.init == "svd" else 0

    def num_cut_rows(self, trained: list[ParameterShape]) -> int:
        """Rows of factors that lie on several ranks, of tensors of one process group."""
        return num_cut_rows(trained, self.zero.stage, self.string_numel // self.world_size)

    def kept_buckets(self, num_ranks: int) -> list[int]:
        """Numbers, padding counted, of each gather after a step: what is trained and kept whole, of a process group."""
        kept = [one for one in self.shapes.parameters.values() if one.trainable and one.is_kept_whole]
        of_group = [one for one in kept if one.num_pieces == num_ranks > 1]
        buckets = in_buckets(of_group, lambda one: one.numel, self.zero.prefetch_bucket_size)
        return [sum(one.padded for one in bucket) for bucket in buckets]

    @cached_property
    def gathered(self) -> Gathered:
        """What a micro-batch gathers; nothing below stage 3."""
        if self.zero.stage < 3 or self.world_size == 1:
            return Gathered()
        rules = GatherRules(self.zero.prefetch_bucket_size, self.zero.max_live_parameters, self.zero.max_reuse_distance)
        return gathered_in_pass(self.shapes, self.passed.calls, rules, self.recipe.train.activation_checkpointing)


def num_moments(optim: OptimConfig) -> int:
    """fp32 numbers that the optimizer keeps of each trained number."""
    return 2 if optim.name == "adamw" else int(optim.momentum > 0)


@dataclass
class Memo:
    """What is worked out once, where many runs of a model are planned.

    Args:
        shapes: of a model on so many ranks
        passes: of a micro-batch
    """

    shapes: dict[str, ModelShapes] = field(default_factory=dict)
    passes: dict[str, PassBytes] = field(default_factory=dict)


def rehearse(recipe: Recipe, deepspeed: dict[str, Any], world_size: int, memo: Memo | None = None) -> Rehearsal:
    """What plans of a run are made from; some ten seconds for a 70B model.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W
        memo: of earlier calls

    Raises:
        UserError: recipe, DeepSpeed file and model cannot work together
    """
    recipe.train.accumulation_steps(world_size)
    memo = memo or Memo()
    config = merge_config(recipe, deepspeed, world_size)
    model = repr((recipe.model, recipe.adapter, recipe.parallel))
    zero = config["zero_optimization"]
    on_ranks = repr((model, world_size, zero["stage"], zero.get("stage3_param_persistence_threshold")))
    if on_ranks not in memo.shapes:
        memo.shapes[on_ranks] = shapes_of(recipe, config, world_size)
    train = recipe.train
    rows = (train.micro_batch_size, train.activation_checkpointing, train.loss_chunk)
    of_rows = repr((model, recipe.data.max_length, recipe.data.packing, recipe.losses, rows))
    if of_rows not in memo.passes:
        described = load_model_config(recipe.model)
        without_dropout(described)
        memo.passes[of_rows] = pass_bytes(described, recipe, memo.shapes[on_ranks].placement)
    return Rehearsal(recipe, config, memo.shapes[on_ranks], memo.passes[of_rows])
