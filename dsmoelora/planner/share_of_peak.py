"""What the trainer needs to tell the share of the peak that it reaches."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config import ParallelConfig, Recipe
from dsmoelora.model import load_model_config, without_dropout
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.planner.devices import Device, device_called, device_named
from dsmoelora.planner.flops import TokenFlops
from dsmoelora.planner.stand_in import pass_bytes

logger = logging.getLogger(__name__)


def device_of_run(recipe: Recipe) -> Device | None:
    """The device of `train.device`; None where nobody knows its peak, or not in the dtype of the run.

    Raises:
        ConfigError: there is no such device
    """
    if recipe.train.device != "auto":
        return device_named(recipe.train.device, key="train.device")
    device = device_called(torch.cuda.get_device_name()) if get_accelerator().device_name() == "cuda" else None
    return device if device is not None and device.dtype == recipe.model.dtype else None


def token_flops(recipe: Recipe) -> TokenFlops | None:
    """What a token of the recipe's model costs, wherever its experts lie and whatever its base is packed in.

    None, with a word to the log, where they cannot be counted, as of a model whose code does not run on tensors without
    memory: a run can do without.
    """
    alone = replace(recipe, parallel=ParallelConfig())
    described = load_model_config(alone.model)
    without_dropout(described)
    all_experts = ExpertPlacement(alone.adapter.num_in_layer, ep_size=1, world_size=1, rank=0)
    try:
        flops = pass_bytes(described, alone, all_experts).flops
    except Exception as error:  # a model's own code need not run without weights, and may train all the same
        logger.debug("The products of a token cannot be counted.", exc_info=error)
        logger.info(
            "no mfu(%%): the products of %s cannot be counted (%s)", recipe.model.path, str(error).split("\n")[0]
        )
        return None
    return TokenFlops.of(flops, recipe.train.micro_batch_size, recipe.data.max_length)
