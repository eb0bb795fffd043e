"""What the DeepSpeed file may say beside the recipe, and what happens where the two do not go together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.config import AdapterConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.errors import ConfigError
from dsmoelora.parallel import zero, zero_config
from dsmoelora.parallel.versions import check_version
from dsmoelora.parallel.zero_config import keep_whole_what_fits, merge_config


def skip_without_stage(stage: Any) -> None:
    """Older versions of DeepSpeed are refused for stages 1 and 2, whatever else a file says."""
    if stage in (1, 2):
        try:
            check_version(stage)
        except ConfigError as error:
            pytest.skip(str(error))


FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def make_recipe(dtype: Any = "bf16") -> Recipe:
    return Recipe(
        model=ModelConfig(dtype=dtype),
        adapter=AdapterConfig(),
        optim=OptimConfig(max_grad_norm=0.5),
        train=TrainConfig(batch_size=24, micro_batch_size=2),
    )


def with_zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | settings}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 12), (3, 4), (12, 1)])
def test_the_recipe_fills_in_batch_sizes_clipping_and_precision(world_size: int, accumulation: int) -> None:
    config = merge_config(make_recipe(), with_zero(), world_size)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is True
    assert merge_config(make_recipe("fp32"), with_zero(), world_size)["bf16"]["enabled"] is False


def test_gradients_are_summed_in_fp32_and_one_step_sees_them_all() -> None:
    config = merge_config(make_recipe(), with_zero(), 1)
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["sub_group_size"] == 10**12


def test_the_users_file_is_kept_and_not_written_to() -> None:
    given = {"wall_clock_breakdown": True, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    given |= with_zero(reduce_bucket_size=1000, overlap_comm=True)
    before = json.dumps(given)
    config = merge_config(make_recipe(), given, 1)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["train_batch_size"] == 24
    assert json.dumps(given) == before


def test_values_that_agree_with_the_recipe_are_fine() -> None:
    given = {"train_batch_size": 24, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5} | with_zero()
    assert merge_config(make_recipe(), given, 3)["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_that_we_ship_go_with_any_recipe(file: Path) -> None:
    given = json.loads(file.read_text())
    skip_without_stage(given["zero_optimization"]["stage"])
    for dtype in ("fp32",) if given["zero_optimization"]["stage"] == 0 else ("bf16", "fp32"):
        assert merge_config(make_recipe(dtype), given, 2)["train_batch_size"] == 24


def test_we_ship_files() -> None:
    assert {"zero3.json", "zero3_offload.json"} <= {file.name for file in FILES}


CONFLICTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"train_batch_size": 32}, ("train_batch_size", "is 32", "24", "recipe")),
    ({"train_micro_batch_size_per_gpu": 1}, ("train_micro_batch_size_per_gpu", "is 1", "2", "recipe")),
    ({"gradient_accumulation_steps": 8}, ("gradient_accumulation_steps", "is 8", "4", "recipe")),
    ({"gradient_clipping": 1.0}, ("gradient_clipping", "is 1.0", "0.5", "recipe")),
    ({"bf16": {"enabled": False}}, ("bf16.enabled", "is False", "True", "recipe")),
    ({"fp16": {"enabled": True}}, ("fp16.enabled", "is True", "False", "recipe")),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, ("data_types.grad_accum_dtype", "'bf16'", "'fp32'")),
    ({"communication_data_type": "bf16"}, ("communication_data_type", "'bf16'", "'fp32'")),
    ({"zero_force_ds_cpu_optimizer": True}, ("zero_force_ds_cpu_optimizer", "is True", "False")),
    (with_zero(sub_group_size=10**9), ("sub_group_size", "is 1000000000")),
]
SECTIONS_OF_THE_RECIPE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"optimizer": {"type": "AdamW"}}, ("'optimizer'", "set optim in the recipe")),
    ({"scheduler": {"type": "WarmupLR"}}, ("'scheduler'", "set optim.schedule in the recipe")),
]
UNKNOWN: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"zero_optimisation": {}}, ("'zero_optimisation'", "zero_optimization")),
    ({"torch_autocast": {"enabled": True}}, ("'torch_autocast'", "Drop it")),
    ({"activation_checkpointing": {}}, ("'activation_checkpointing'", "Drop it")),
]
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (with_zero(zero_hpz_partition_size=2), ("zero_hpz_partition_size", "hpZ")),
    (with_zero(mics_shard_size=2), ("mics_shard_size", "MiCS")),
    (with_zero(zero_quantized_weights=True), ("zero_quantized_weights", "ZeRO++")),
    (with_zero(zero_quantized_nontrainable_weights=True), ("zero_quantized_nontrainable_weights", "ZeRO++")),
    (with_zero(zero_quantized_gradients=True), ("zero_quantized_gradients", "ZeRO++")),
    (with_zero(zenflow={"topk_ratio": 0.1}), ("zenflow", "ZenFlow")),
    (with_zero(stage3_module_granularity_threshold=1), ("stage3_module_granularity_threshold", "fetched by their own")),
    (with_zero(offload_optimizer={"device": "cpu", "super_offload": True}), ("super_offload",)),
    (with_zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), ("offload_optimizer.ratio",)),
    (with_zero(offload_optimizer={"device": "nvme"}), ("offload_optimizer.device", "NVMe")),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, ("bf16_master_weights_and_grads", "fp32")),
    ({"bf16": {"bf16_optimizer_states": True}}, ("bf16_optimizer_states", "fp32")),
    (with_zero(stage=0), ("zero_optimization.stage", "is 0", "1, 2 or 3", "bf16", "zero2.json")),
    (with_zero(stage=4), ("zero_optimization.stage", "is 4", "0, 1, 2 or 3")),
    (with_zero(stage=True), ("zero_optimization.stage", "is True")),
    (with_zero(stage=2, offload_param={"device": "cpu"}), ("offload_param.device", "stage 3", "has stage 2")),
    ({"zero_optimization": {}}, ("zero_optimization.stage", "is None")),
    ({"fp16": {"fp16_master_weights_and_grads": True}}, ("fp16.fp16_master_weights_and_grads", "fp32")),
]


OF_THE_WRONG_TYPE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (with_zero(offload_optimizer={"device": "cpu", "ratio": "half"}), ("offload_optimizer.ratio", "'half'", "number")),
    (with_zero(offload_optimizer=3), ("zero_optimization.offload_optimizer", "is 3")),
    (with_zero(zero_hpz_partition_size="two"), ("zero_hpz_partition_size", "'two'", "integer")),
    (with_zero(stage="3"), ("zero_optimization.stage", "is '3'")),
    ({"fp16": {"initial_scale_power": "big"}}, ("fp16.initial_scale_power", "'big'", "integer")),
    ({"fp16": {"loss_scale": None}}, ("fp16.loss_scale", "None", "number")),
    ({"bf16": {"check_overflow": True}}, ("bf16.check_overflow", "Did you mean check_grad_overflow?")),
    ({"bf16": 1}, ("bf16", "is 1", "JSON object")),
    ({"comms_logger": {"enabled": "maybe"}}, ("comms_logger.enabled", "'maybe'", "boolean")),
    ({"flops_profiler": True}, ("flops_profiler", "is True", "JSON object")),
    ({"steps_per_print": "ten"}, ("steps_per_print", "'ten'", "whole number")),
    ({"wall_clock_breakdown": "yes"}, ("wall_clock_breakdown", "'yes'", "true or false")),
]


@pytest.mark.parametrize(
    ("given", "words"),
    [*CONFLICTS, *SECTIONS_OF_THE_RECIPE, *UNKNOWN, *REFUSED, *OF_THE_WRONG_TYPE],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_named(given: dict[str, Any], words: tuple[str, ...]) -> None:
    skip_without_stage(given.get("zero_optimization", {}).get("stage"))
    with pytest.raises(ConfigError) as error:
        merge_config(make_recipe(), with_zero() | given, 3)
    for word in words:
        assert word in str(error.value)


def test_frozen_factors_are_not_on_nvme() -> None:
    recipe = make_recipe()
    frozen = replace(recipe, adapter=replace(recipe.adapter, freeze=["a"]))
    for device in ("nvme", "cpu"):
        given = with_zero(offload_param={"device": device, "nvme_path": "/tmp"})
        merge_config(recipe, given, 3)
        if device == "cpu":
            merge_config(frozen, given, 3)
        else:
            with pytest.raises(ConfigError, match=r"offload_param\.device of the DeepSpeed file is 'nvme'.*freeze"):
                merge_config(frozen, given, 3)


def test_nothing_is_offloaded_without_partitions() -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device.*below stage 1"):
        merge_config(make_recipe("fp32"), with_zero(stage=0, offload_optimizer={"device": "cpu"}), 3)


def test_fp16_needs_an_accelerator_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = with_zero() | {"fp16": {"initial_scale_power": 8}}
    monkeypatch.setattr(zero_config.get_accelerator(), "is_fp16_supported", lambda: True)
    config = merge_config(make_recipe("fp16"), given, 3)
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert config["bf16"]["enabled"] is False
    monkeypatch.setattr(zero_config.get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.dtype is 'fp16'.*bf16.*has no fp16.*Set auto"):
        merge_config(make_recipe("fp16"), given, 3)


def test_a_batch_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 24.*2 x 5 = 10.*Nearest: 20"):
        merge_config(make_recipe(), with_zero(), 5)


@pytest.mark.parametrize(
    ("given", "trained", "frozen", "threshold"),
    [
        ({}, [327_680] * 128, [4096 * 4096] * 128, 327_680),
        ({"stage3_param_persistence_threshold": "auto"}, [327_680], [4096 * 4096] * 2, 4096 * 4096),
        ({}, [300], [4096], 100_000),
        ({}, [46_080] * 120, [576 * 1536] * 90 + [49_152 * 576], 49_152 * 576),
        ({}, [327_680] * 32, [2048 * 512] * 32 + [2048 * 2048] * 64, 2048 * 512),
        ({"stage3_param_persistence_threshold": 7}, [327_680], [4096 * 4096], 7),
        ({}, [4096 * 4096] * 4, [4096 * 4096] * 128, 100_000),
        ({"stage": 2}, [327_680], [4096 * 4096], None),
    ],
    ids=[
        "adapters-of-7b",
        "auto",
        "little",
        "all-of-a-small-model",
        "smaller-weights-of-a-larger-one",
        "the-users-own",
        "more-than-fits",
        "stage-2",
    ],
)
def test_what_fits_stays_whole(
    given: dict[str, Any], trained: list[int], frozen: list[int], threshold: int | None
) -> None:
    skip_without_stage(given.get("stage"))
    config = merge_config(make_recipe(), with_zero(**given), 1)
    keep_whole_what_fits(config, trained, frozen)
    assert config["zero_optimization"].get("stage3_param_persistence_threshold") == threshold


@pytest.mark.parametrize(
    ("version", "stages"),
    [
        ("0.19.3", ()),
        ("0.19.4", (0, 3)),
        ("0.19.6", (0, 3)),
        ("0.19.7", (0, 3)),
        ("0.19.8", (0, 1, 2, 3)),
        ("0.20.1+local", (0, 1, 2, 3)),
    ],
)
def test_a_deepspeed_that_is_too_old_for_a_stage_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, stages: tuple[int, ...]
) -> None:
    monkeypatch.setattr("deepspeed.__version__", version)
    for stage in range(4):
        if stage in stages:
            merge_config(make_recipe("fp32"), with_zero(stage=stage), 3)
        else:
            with pytest.raises(ConfigError, match=rf"{version}.*0\.19\.[48] or newer.*pip install deepspeed==0\.19\.8"):
                merge_config(make_recipe("fp32"), with_zero(stage=stage), 3)


def test_an_optimizer_that_lacks_what_is_read_of_it_is_refused_by_name() -> None:
    """In its place a DeepSpeed of another build would otherwise fail in the midst of a step."""
    optimizer = object.__new__(zero.DeepSpeedZeroOptimizer)
    with pytest.raises(ConfigError, match=r"DeepSpeedZeroOptimizer has no round_robin_bit16_groups\. pip install"):
        zero._check_internals(optimizer)
    with pytest.raises(ConfigError, match="a SGD steps"):
        zero._check_internals(torch.optim.SGD([torch.zeros(1)]))
