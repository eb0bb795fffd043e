"""What every part of a plan is made from: the recipe, the sizes of the model, one micro-batch without memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsmoelora.config import Recipe
from dsmoelora.errors import bad_value
from dsmoelora.model import load_model_config, without_dropout
from dsmoelora.parallel.zero_config import merge_config, read_zero
from dsmoelora.planner.gathering import Gathered, GatherRules, gathered_in_pass
from dsmoelora.planner.shapes import ModelShapes, shapes_of
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

    @property
    def world_size(self) -> int:
        """W."""
        return self.shapes.layout.world_size

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model."""
        return self.recipe.model.torch_dtype.itemsize

    @cached_property
    def gathered(self) -> Gathered:
        """What a micro-batch gathers; nothing below stage 3."""
        if self.zero.stage < 3 or self.world_size == 1:
            return Gathered()
        rules = GatherRules(self.zero.prefetch_bucket_size, self.zero.max_live_parameters, self.zero.max_reuse_distance)
        return gathered_in_pass(self.shapes, self.passed.order, rules, self.recipe.train.activation_checkpointing)


def rehearse(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> Rehearsal:
    """What plans of a run are made from; some ten seconds for a 70B model.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: content of the DeepSpeed file
        world_size: W

    Raises:
        UserError: recipe, DeepSpeed file and model cannot work together
    """
    if recipe.parallel.ep_size > 1:
        raise bad_value(
            "parallel.ep_size",
            recipe.parallel.ep_size,
            "1 for a plan of the memory, which does not know yet what the token exchange keeps",
            "Plan with --parallel.ep_size 1, which takes more for experts and less for their tokens.",
        )
    if recipe.model.quantize != "none":
        raise bad_value(
            "model.quantize",
            recipe.model.quantize,
            "none for a plan of the memory, which does not know yet what a base in 4 bits takes",
            "Plan with --model.quantize none, which takes more.",
        )
    recipe.train.accumulation_steps(world_size)
    config = merge_config(recipe, deepspeed, world_size)
    shapes = shapes_of(recipe, config, world_size)
    described = load_model_config(recipe.model)
    without_dropout(described)
    return Rehearsal(recipe, config, shapes, pass_bytes(described, recipe))
