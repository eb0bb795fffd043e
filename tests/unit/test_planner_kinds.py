"""Every setting of the adapter that has a name can be planned, by all that plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from dsmoelora.config import AdapterConfig, DataConfig, LossesConfig, ModelConfig, ParallelConfig, Recipe, TrainConfig
from dsmoelora.config.adapter import InitName
from dsmoelora.config.adapter_options import EXPERTS, ROUTERS, Pooling, RouterStart, Style
from dsmoelora.planner import short_plan, token_flops
from tests.given_adapters import peft_adapter
from tests.helpers import tiny_llama

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
STYLES: dict[str, dict[str, Any]] = {
    "per_linear": {},
    "ffn_block": {"target_modules": FEED_FORWARD, "lora_modules": ["q_proj"]},
    "decoder_layer": {"target_modules": FEED_FORWARD, "num_experts": 3, "router": "prompt"},
}
OTHERS: list[dict[str, Any]] = [
    {"num_experts": 1, "target_modules": "all-linear"},
    {"num_experts": 1, "expert": "dora"},
    {"expert": "dora", "lora_modules": ["up_proj", "lm_head"]},
    {"expert": "dora", "lora_dropout": 0.1},
    {"expert": "dora", "style": "ffn_block", "target_modules": FEED_FORWARD},
    {"expert": "moslora", "router": "constant"},
    {"expert": "moslora", "mixer_init": "orthogonal", "lora_modules": ["up_proj"]},
    {"shared_experts": 2},
    {"shared_experts": 1, "style": "ffn_block", "target_modules": FEED_FORWARD},
    {"gate_power": 0.5, "gate_power_scope": "factors_and_input"},
    {"top_k_warmup": 1},
    {"freeze": ["a", "router"]},
]
ADAPTERS: list[dict[str, Any]] = [
    *({"expert": name} for name in EXPERTS),
    *({"router": name} for name in ROUTERS),
    *({"router": "prompt", "pooling": name} for name in get_args(Pooling)),
    *({"router": "constant", "router_start": name} for name in get_args(RouterStart)),
    *({"style": name, **STYLES[name]} for name in get_args(Style)),
    *({"init": name} for name in get_args(InitName)),
    *OTHERS,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(peft_adapter(base, tmp_path_factory.mktemp("adapter"), r=2, target_modules=["q_proj", "v_proj"]))


def check_planned(base: Path, adapter: dict[str, Any], **sections: Any) -> None:
    """Memory, traffic and time of two ranks, and the products of a token."""
    settings: dict[str, Any] = {"num_experts": 4, "r": 2, "target_modules": ["q_proj", "v_proj"]}
    recipe = Recipe(
        adapter=AdapterConfig(**settings | adapter),
        data=DataConfig(max_length=16),
        train=TrainConfig(batch_size=4, micro_batch_size=2, max_steps=4, device="a100-40"),
        **{"model": ModelConfig(path=str(base), dtype="bf16")} | sections,
    )
    rows = dict(short_plan(recipe, {"zero_optimization": {"stage": 3}}, 2))
    assert rows["memory of a rank"].startswith("fits")
    assert "tokens/s" in rows["time of a step"]
    assert token_flops(recipe) is not None


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_every_kind_of_adapter_is_planned(settings: dict[str, Any], base: Path, adapter: str) -> None:
    if settings.get("router") == "arrow":  # which looks at what experts have learned
        settings = {**settings, "experts_from": [adapter] * 4}
    sections: dict[str, Any] = {}
    if settings.get("init") == "loftq":
        sections["model"] = ModelConfig(path=str(base), dtype="bf16", quantize="nf4")
    check_planned(base, settings, **sections)


@pytest.mark.parametrize("expert", ["lora", "moslora"])
def test_experts_on_a_base_in_4_bits_are_planned(expert: str, base: Path) -> None:
    check_planned(base, {"expert": expert}, model=ModelConfig(path=str(base), dtype="bf16", quantize="nf4"))


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
def test_experts_on_several_ranks_are_planned(exchange: Any, expert: str, base: Path) -> None:
    check_planned(base, {"expert": expert}, parallel=ParallelConfig(ep_size=2, exchange=exchange))


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("loss", LossesConfig().weights)
def test_losses_of_experts_are_planned(loss: str, expert: str, base: Path) -> None:
    check_planned(base, {"expert": expert}, losses=LossesConfig(**{loss: 0.01}))
