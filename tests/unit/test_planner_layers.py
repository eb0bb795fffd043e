"""Models of fewer layers that stand for a whole one, beside the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from dsmoelora.adapters.given import settings_of
from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, Recipe, TrainConfig
from dsmoelora.errors import ConfigError
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.planner import at_start, plan_memory, short_plan, stand_in, token_flops
from dsmoelora.planner.at_start import check_memory
from dsmoelora.planner.devices import GIB
from dsmoelora.planner.fewer_layers import Sample, samples_of
from dsmoelora.planner.stand_in import _measured, pass_bytes
from tests.given_adapters import our_adapter, peft_adapter
from tests.helpers import tiny_llama

ALONE = ExpertPlacement(4, 1, 1, 0)
NUM_LAYERS = 12
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_hidden_layers": NUM_LAYERS,
}
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def recipe_of(checkpointing: bool = False, path: Path | str = "", **adapter: Any) -> Recipe:
    settings: dict[str, Any] = {"num_experts": 4, "r": 2, "target_modules": ["q_proj", "v_proj"]}
    return Recipe(
        model=ModelConfig(path=str(path), dtype="fp32", attention="eager"),
        adapter=AdapterConfig(**settings | adapter),
        data=DataConfig(max_length=24),
        train=TrainConfig(
            batch_size=4, micro_batch_size=2, max_steps=2, loss_chunk=16, activation_checkpointing=checkpointing
        ),
    )


def samples(shape: Any, recipe: Recipe) -> list[Sample]:
    with torch.device("meta"):
        return samples_of(shape, recipe, AutoModelForCausalLM.from_config(shape))


def names(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn.q_proj" for layer in layers]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "adapter"),
    [
        (LlamaConfig(**SIZES), {"target_modules": names(*range(NUM_LAYERS))}),
        (LlamaConfig(**SIZES), {"target_modules": names(0, 1, 2, 3)}),
        (LlamaConfig(**SIZES), {"target_modules": names(10, 11)}),
        (LlamaConfig(**SIZES), {"target_modules": ["q_proj"], "lora_modules": ["11.mlp.up_proj", "lm_head"]}),
        (Gemma2Config(**SIZES | {"num_hidden_layers": 13}, head_dim=8), {}),  # the last of pairs stands alone
    ],
)
def test_layers_that_are_not_alike_take_what_they_take_in_the_whole_model(
    shape: Any, adapter: dict[str, Any], checkpointing: bool
) -> None:
    """Those before the first adapter get no gradient, and keep nothing."""
    recipe = recipe_of(checkpointing, **adapter)
    assert sum(one.shape.num_hidden_layers for one in samples(shape, recipe)) < shape.num_hidden_layers
    few, whole = pass_bytes(shape, recipe, ALONE), _measured(shape, recipe, ALONE)
    assert few.kept == pytest.approx(whole.kept, rel=0.005)
    assert few.peak == pytest.approx(whole.peak, rel=0.015)
    assert few.flops == whole.flops
    assert few.calls == whole.calls


def test_the_fewest_layers_are_run() -> None:
    """Of each run of layers one, and once two of each run that is longer than two."""
    shape = LlamaConfig(**SIZES)
    alike = samples(shape, recipe_of())
    assert [(one.times, one.shape.num_hidden_layers) for one in alike] == [(1 - 11, 1), (11, 2)]
    last_two = samples(shape, recipe_of(target_modules=names(10, 11)))
    assert [(one.times, one.shape.num_hidden_layers) for one in last_two] == [(1 - 9, 3), (9, 4)]
    assert [one.recipe.adapter.target_modules for one in last_two] == [names(1, 2), names(2, 3)]
    (whole,) = samples(shape, recipe_of(target_modules=names(*range(0, NUM_LAYERS, 2))))
    assert whole.shape is shape
    assert whole.times == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture
def device_of_80_gib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    accelerator = SimpleNamespace(device_name=lambda: "cuda", total_memory=lambda: 80 * GIB)
    monkeypatch.setattr(at_start, "get_accelerator", lambda: accelerator)
    yield


def given(kind: str, base: Path, folder: Path) -> dict[str, Any]:
    """Settings of a run that starts from an adapter of a model with four layers."""
    if kind == "plain layers":
        config = AdapterConfig(r=2, num_experts=3, target_modules=["q_proj"], lora_modules=["up_proj"])
        our_adapter(base, folder, config)
    else:
        peft_adapter(base, folder)
    if kind == "layers of a kind":
        said: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
    else:
        said = {"router": "arrow", "top_k": 1} if kind == "arrow" else {}
    paths = [str(folder)] * (2 if kind == "arrow" else 1)
    return {"experts_from": paths, **said, **settings_of(paths, said)}


@pytest.mark.parametrize("kind", ["by name", "layers of a kind", "plain layers", "arrow"])
def test_a_run_that_starts_from_adapters_is_planned_as_one_that_does_not(
    kind: str, base: Path, tmp_path: Path, device_of_80_gib: None
) -> None:
    settings = given(kind, base, tmp_path / "adapter")
    recipe = recipe_of(path=base, **settings)
    assert check_memory(recipe, ZERO, 2) == []
    assert dict(short_plan(recipe, ZERO, 2))["memory of a rank"].endswith("(train.device says whether that fits)")
    assert token_flops(recipe) is not None
    if kind == "arrow":
        return  # whose router wants adapters
    plain = recipe_of(path=base, **settings | {"experts_from": []})
    assert plan_memory(recipe, ZERO, 2) == plan_memory(plain, ZERO, 2)


def test_layers_may_be_named_by_their_number(base: Path, device_of_80_gib: None) -> None:
    recipe = recipe_of(path=base, target_modules=names(2, 3), lora_modules=["layers.1.mlp.up_proj"])
    assert check_memory(recipe, ZERO, 2) == []
    assert "of it" in dict(short_plan(recipe, ZERO, 2))
    missing = replace(recipe, adapter=replace(recipe.adapter, target_modules=names(3, 4)))
    with pytest.raises(ConfigError, match=r"adapter\.target_modules is 'model\.layers\.4\.self_attn\.q_proj'"):
        check_memory(missing, ZERO, 2)


def test_what_is_wrong_with_the_stand_in_alone_is_no_mistake_of_the_user(
    base: Path, monkeypatch: pytest.MonkeyPatch, device_of_80_gib: None
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("no such layer")

    monkeypatch.setattr(stand_in, "inject", refuse)
    recipe = recipe_of(path=base)
    assert check_memory(recipe, ZERO, 2) == []
    assert token_flops(recipe) is None
    (row,) = short_plan(recipe, ZERO, 2)
    assert row[1].startswith("cannot be planned: ")
