"""The parameters of an adapted model and how ZeRO cuts them, without any of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from dsmoelora.adapters import inject
from dsmoelora.config import Recipe
from dsmoelora.model import model_without_weights
from dsmoelora.model.quantizing import pack_on_meta
from dsmoelora.optim import trainables
from dsmoelora.optim.rows import Trainable, adapter_tensors
from dsmoelora.parallel.placement import ExpertPlacement, check_placement
from dsmoelora.parallel.zero_config import keep_whole_what_fits, read_zero


@dataclass(frozen=True)
class ParameterShape:
    """A parameter of a rank.

    Args:
        name: in the model
        numel: numbers that the ranks hold together which cut it among themselves
        num_pieces: these ranks: W, or W / P for experts of an expert-parallel group
        trainable: what it is to the optimizer; None for the frozen base
        is_kept_whole: ZeRO-3 keeps it whole on each rank between steps
    """

    name: str
    numel: int
    num_pieces: int
    trainable: Trainable | None = None
    is_kept_whole: bool = False

    @property
    def piece(self) -> int:
        """Numbers of each rank under ZeRO-3, the last one's padding counted."""
        return -(-self.numel // self.num_pieces)

    @property
    def padded(self) -> int:
        """Numbers of all pieces together."""
        return self.piece * self.num_pieces


@dataclass(frozen=True)
class ModelShapes:
    """An adapted model.

    Args:
        model: on the meta device, with the experts of one rank
        placement: of the first rank
        parameters: in the order of the model, by identity of the parameter
        buffer_bytes: of its buffers, which every rank has
    """

    model: nn.Module
    placement: ExpertPlacement
    parameters: dict[int, ParameterShape]
    buffer_bytes: int

    @property
    def frozen(self) -> list[ParameterShape]:
        """Those of the base, and factors that stay as they are."""
        return [one for one in self.parameters.values() if one.trainable is None]

    @property
    def trained(self) -> list[ParameterShape]:
        """Those of experts and routers, in the order of `optim.rows.trainables`, in which ZeRO has them."""
        found = [(one.trainable, one) for one in self.parameters.values() if one.trainable is not None]
        return [one for _, one in sorted(found, key=lambda pair: (pair[0].factor.value, pair[0].shape))]


def shapes_of(recipe: Recipe, deepspeed: dict[str, Any], world_size: int) -> ModelShapes:
    """The parameters of a run on W ranks.

    Args:
        recipe: of the run, with its dtype settled
        deepspeed: from `merge_config`
        world_size: W

    Raises:
        UserError: there is no such model, its layers do not fit the recipe, or ranks do not divide by `ep_size`
    """
    check_placement(recipe, world_size)
    placement = ExpertPlacement(recipe.adapter.num_in_layer, recipe.parallel.ep_size, world_size, rank=0)
    model = model_without_weights(recipe.model)
    if recipe.model.quantize != "none":
        pack_on_meta(model, recipe.model.torch_dtype)
    inject(model, recipe.adapter, placement.local_experts, start=lambda _: None)
    by_parameter = {id(parameter): trainable for trainable, parameter in trainables(model)}
    parameters = {}
    threshold = _threshold(model, deepspeed, placement)
    for name, parameter in model.named_parameters():
        trainable = by_parameter.get(id(parameter))
        is_shared_out = trainable is not None and len(placement.experts_of(trainable)) < trainable.shape[0]
        num_pieces = world_size // placement.ep_size if is_shared_out else world_size
        parameters[id(parameter)] = ParameterShape(
            name, parameter.numel(), num_pieces, trainable, is_kept_whole=parameter.numel() <= threshold
        )
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    return ModelShapes(model, placement, parameters, buffer_bytes)


def _threshold(model: nn.Module, deepspeed: dict[str, Any], placement: ExpertPlacement) -> int:
    """The most numbers of a parameter that ZeRO-3 keeps whole, as the engine has it; -1 below stage 3."""
    config = copy.deepcopy(deepspeed)
    adapters = [parameter for _, parameter in adapter_tensors(model)]
    known = set(map(id, adapters))
    base = [one.numel() for one in model.parameters() if id(one) not in known]
    if placement.ep_size == 1:
        keep_whole_what_fits(config, [one.numel() for one in adapters], base)
    zero = read_zero(config)
    return zero.param_persistence_threshold if zero.stage == 3 else -1
