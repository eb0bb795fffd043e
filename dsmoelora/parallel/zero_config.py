"""The DeepSpeed configuration of a run: what the user's file may say, and what the recipe says.

Checked against deepspeed 0.19.4 to 0.19.8, `runtime/config.py` and the classes that it reads its sections with.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from itertools import accumulate
from typing import Any, cast

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import BaseModel, ValidationError

from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError, bad_value, listing
from dsmoelora.parallel.versions import check_version

# What the user may set beside `zero_optimization`; everything else would be ignored, or decide what the recipe decides.
_FREE_KEYS = {
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
}
_RECIPE_SECTIONS = {"optimizer": "optim", "scheduler": "optim.schedule"}
_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
}
_STAGE_KEY = "zero_optimization.stage of the DeepSpeed file"
# One sub-group per process group, so that one call of the optimizer's step sees every gradient.
_ONE_SUB_GROUP = int(1e12)


_THRESHOLD_KEY = "stage3_param_persistence_threshold"
# DeepSpeed's own threshold, and the most numbers that may stay whole on a rank
_SMALL, _MAX_KEPT_WHOLE = 100_000, 1 << 28


def keep_whole_what_fits(config: dict[str, Any], adapters: list[int], base: list[int]) -> None:
    """Have ZeRO-3 keep adapters gathered between steps, and of the base what fits beside them.

    Above the threshold every layer gathers its weights anew, in each forward and backward pass of each micro-batch;
    of those below it what is trained is gathered together, once a step. Masters, moments and gradients stay in pieces.
    Done where the user sets no threshold, and as far as no more than 2^28 numbers stay (half a GiB in 16 bits): all of
    a small model, the adapters and smaller weights of a large one, or only what DeepSpeed keeps itself where not even
    adapters fit.

    Args:
        config: from `merge_config`, written to
        adapters: numbers of each parameter of the adapters on this rank, before it is partitioned; trained or frozen
        base: numbers of each parameter of the base
    """
    zero = config["zero_optimization"]
    if zero["stage"] != 3 or zero.get(_THRESHOLD_KEY, "auto") != "auto":
        return
    counts = sorted(Counter((*adapters, *base)).items())
    kept = accumulate(numel * count for numel, count in counts)
    fitting = [numel for (numel, _), total in zip(counts, kept, strict=True) if total <= _MAX_KEPT_WHOLE]
    threshold = max([_SMALL, *fitting])
    zero[_THRESHOLD_KEY] = threshold if threshold >= max(adapters) else _SMALL


def read_zero(config: dict[str, Any]) -> DeepSpeedZeroConfig:
    """The section `zero_optimization` of a merged configuration as DeepSpeed reads it, with its defaults."""
    return cast(DeepSpeedZeroConfig, _checked("zero_optimization", DeepSpeedZeroConfig, config))


def merge_config(recipe: Recipe, user_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's file, filled in from the recipe.

    The recipe decides batch sizes, accumulation, clipping and precision; the file decides how ZeRO works. A key that
    both give must agree (`"auto"` always agrees).

    Args:
        recipe: of the run
        user_config: content of the file of `--deepspeed`
        world_size: number of ranks

    Raises:
        ConfigError: the two files disagree, or the file asks for what the sharded optimizer step cannot do
    """
    _check_sections(user_config)
    _refuse_unknown_keys(user_config)
    _refuse_what_cannot_work(user_config, recipe)
    config = copy.deepcopy(user_config)
    for path, value in _filled_in(recipe, world_size).items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        given = section.get(key, "auto")
        if given != "auto" and given != value:
            raise bad_value(
                f"{path} of the DeepSpeed file", given, f"{value!r}, which follows from the recipe", "Drop it there."
            )
        section[key] = value
    return config


def _filled_in(recipe: Recipe, world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": recipe.train.batch_size,
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": recipe.train.accumulation_steps(world_size),
        "gradient_clipping": float(recipe.optim.max_grad_norm),
        "bf16.enabled": recipe.model.dtype == "bf16",
        "bf16.check_grad_overflow": True,
        "fp16.enabled": recipe.model.dtype == "fp16",
        "data_types.grad_accum_dtype": "fp32",
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization.sub_group_size": _ONE_SUB_GROUP,
    }


def _refuse_unknown_keys(config: dict[str, Any]) -> None:
    filled = {path.partition(".")[0] for path in _filled_in(Recipe(), world_size=1)}
    for key in config:
        if key in _RECIPE_SECTIONS:
            raise ConfigError(
                f"The DeepSpeed file has the section {key!r}, but the recipe decides that. "
                f"Drop it there and set {_RECIPE_SECTIONS[key]} in the recipe."
            )
        if key not in filled | _FREE_KEYS:
            allowed = listing(sorted(filled | _FREE_KEYS), limit=30)
            raise ConfigError(f"The DeepSpeed file has the key {key!r}; supported are: {allowed}. Drop it.")


def _refuse_what_cannot_work(config: dict[str, Any], recipe: Recipe) -> None:
    zero = config.get("zero_optimization", {})
    _check_stage(zero)
    _refuse("mics_shard_size", "mics_shard_size" in zero, "MiCS shards over smaller groups")
    read = _check_values(config)["zero_optimization"]
    _check_precision_and_offload(zero, recipe)
    if recipe.parallel.ep_size > 1 and zero.get("stage") != 3:
        raise bad_value(
            _STAGE_KEY,
            zero.get("stage"),
            f"3 where parallel.ep_size is {recipe.parallel.ep_size}, for experts are partitioned by ZeRO-3",
            "Use ds_configs/zero3.json, or set parallel.ep_size to 1.",
        )
    in_place = {
        "adapter.freeze": (recipe.adapter.freeze, "checkpoints hold frozen factors too"),
        "optim.flat_noise": (recipe.optim.flat_noise, "noise is written where the base lies"),
    }
    for key, (value, reason) in in_place.items():
        if value and (read.offload_param or DeepSpeedZeroOffloadParamConfig()).device == "nvme":
            raise bad_value(
                "zero_optimization.offload_param.device of the DeepSpeed file",
                "nvme",
                f"none or cpu where {key} is {value}, for {reason}",
                f"Set it to cpu, or drop {key}.",
            )
    sharded_step = "the optimizer step works on one flat fp32 partition a rank"
    offload = read.offload_optimizer or DeepSpeedZeroOffloadOptimizerConfig()
    refused = {
        "zero_hpz_partition_size": (read.zero_hpz_partition_size > 1, "hpZ keeps a second partition"),
        "zero_quantized_weights": (read.zero_quantized_weights, "ZeRO++ rounds what it gathers"),
        "zero_quantized_nontrainable_weights": (
            read.zero_quantized_nontrainable_weights,
            "ZeRO++ rounds what it gathers",
        ),
        "zero_quantized_gradients": (read.zero_quantized_gradients, "ZeRO++ rounds the gradients"),
        "compute_grad_norm": (
            not getattr(read, "compute_grad_norm", True),
            "a gradient that is not finite would be applied",
        ),
        "stage3_module_granularity_threshold": (
            read.module_granularity_threshold > 0,
            "it has modules fetched as one, and a layer's experts and router are fetched by their own",
        ),
        "zenflow": (read.zenflow is not None, "ZenFlow updates some columns later than others"),
        "offload_optimizer.super_offload": (offload.super_offload, sharded_step),
        "offload_optimizer.ratio": (offload.ratio < 1.0, sharded_step),
        "offload_optimizer.device": (offload.device == "nvme", "optimizer state on NVMe is not one tensor"),
    }
    for key, (is_set, reason) in refused.items():
        _refuse(key, is_set, reason)
    for name in (
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
        "fp16.fp16_master_weights_and_grads",
    ):
        section, _, key = name.partition(".")
        if config.get(section, {}).get(key):
            raise ConfigError(f"{name} of the DeepSpeed file is not supported: masters are fp32. Drop it there.")


def _refuse(key: str, is_set: bool, reason: str) -> None:
    if is_set:
        raise ConfigError(f"zero_optimization.{key} of the DeepSpeed file is not supported: {reason}. Drop it there.")


def _check_stage(zero: dict[str, Any]) -> None:
    stage = zero.get("stage")
    if type(stage) is not int or not 0 <= stage <= 3:
        raise bad_value(_STAGE_KEY, stage, "0, 1, 2 or 3", "Set it to 3.")
    check_version(stage)


def _check_precision_and_offload(zero: dict[str, Any], recipe: Recipe) -> None:
    """Both go together with the stage."""
    stage, dtype = zero["stage"], recipe.model.dtype
    if stage == 0 and dtype != "fp32":
        # its wrappers for 16 bits copy the parameters, and nobody can tell afterwards what a copy is of
        raise bad_value(
            _STAGE_KEY,
            0,
            f"1, 2 or 3 where model.dtype is {dtype}",
            "Use ds_configs/zero2.json, or set model.dtype: fp32.",
        )
    for section, first_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(section) or {}).get("device", "none")
        if device != "none" and stage < first_stage:
            raise bad_value(
                f"zero_optimization.{section}.device of the DeepSpeed file",
                device,
                f"none below stage {first_stage} (the file has stage {stage})",
                f"Drop {section} there, or set stage to {first_stage}.",
            )
    if dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise bad_value(
            "model.dtype",
            dtype,
            f"auto, bf16 or fp32, for the accelerator `{get_accelerator().device_name()}` has no fp16",
            "Set auto.",
        )


def _check_sections(config: dict[str, Any]) -> None:
    for key in (*_SECTIONS, "data_types", "flops_profiler"):
        if not isinstance(config.get(key, {}), dict):
            raise bad_value(f"{key} of the DeepSpeed file", config[key], "a JSON object", "See ds_configs/.")


def _checked(key: str, known: type[BaseModel], config: dict[str, Any]) -> Any:
    """Let DeepSpeed read a section now, for it will do so only when the model is loaded.

    Args:
        key: of the section
        known: what DeepSpeed reads it with
        config: content of the file
    """
    section = {name: value for name, value in config.get(key, {}).items() if value != "auto"}
    try:
        return known(**section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([key, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name.rpartition(".")[2], known.model_fields, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Drop it there."
            raise ConfigError(f"{name} of the DeepSpeed file is no key that DeepSpeed knows. {remedy}") from None
        raise ConfigError(
            f"{name} of the DeepSpeed file is {first['input']!r}, but DeepSpeed wants another value: {first['msg']}. "
            "Correct it there."
        ) from None


def _check_values(config: dict[str, Any]) -> dict[str, Any]:
    """Sections as DeepSpeed reads them; what it takes as it is until it fails in the middle of a run is checked too."""
    for key in ("dump_state", "memory_breakdown", "wall_clock_breakdown"):
        if not isinstance(config.get(key, False), bool):
            raise bad_value(f"{key} of the DeepSpeed file", config[key], "true or false", "Correct it there.")
    steps = config.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise bad_value(
            "steps_per_print of the DeepSpeed file", steps, "a whole number, 1 or more", "Correct it there."
        )
    return {key: _checked(key, known, config) for key, known in _SECTIONS.items()}
