"""K that falls from E while training begins."""

from __future__ import annotations

import copy
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.config.adapter_options import ROUTERS, RouterName

E = 6
FALLING = [router for router in get_args(RouterName) if "top_k_warmup" in ROUTERS[router].options]


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_it_falls_on_a_line_rounded_up(top_k: int, steps: int) -> None:
    config = AdapterConfig(num_experts=E, top_k=top_k, top_k_warmup=steps)
    line = [max(Fraction(0), (E - top_k) * (1 - Fraction(step, steps))) for step in range(steps + 3)]
    assert [config.more_experts(step) for step in range(steps + 3)] == [math.ceil(value) for value in line]
    assert config.more_experts(0) + top_k == E


def test_without_it_k_is_k_from_the_first_step_on() -> None:
    assert [AdapterConfig(num_experts=E, top_k=2).more_experts(step) for step in (0, 1, 9)] == [0, 0, 0]
    assert AdapterConfig(num_experts=E, router="softmax").more_experts(0) == 0


def adapted(router: RouterName, top_k: int, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    inject(model, AdapterConfig(r=2, num_experts=E, router=router, top_k=top_k, target_modules=["0"], **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("experts.b"):
            torch.nn.init.normal_(parameter)
    return model


def outputs(model: nn.Module, more_experts: int) -> Tensor:
    everything_prompt = torch.ones(2, 4, dtype=torch.bool)
    adapter_context(model).tokens = BatchTokens(more_experts=more_experts, prompt_BS=everything_prompt)
    torch.manual_seed(1)  # for the noise
    x_BSD = torch.randn(2, 4, 16)
    return model(x_BSD)


@pytest.mark.parametrize("router", FALLING)
def test_a_router_told_of_more_selects_as_one_with_that_k(router: RouterName) -> None:
    falling, wide = adapted(router, 2, top_k_warmup=9).train(), adapted(router, 5).train()
    torch.testing.assert_close(outputs(falling, 3), outputs(wide, 0), rtol=0, atol=0)
    assert not torch.equal(outputs(falling, 0), outputs(wide, 0))


def test_a_copy_of_a_model_hears_its_own_context() -> None:
    model = adapted("softmax_topk", 2, top_k_warmup=9)
    before = outputs(model, 0)
    twin = copy.deepcopy(model)
    outputs(model, 4)
    torch.testing.assert_close(outputs(twin, 0), before, rtol=0, atol=0)


def test_an_adapter_folder_does_not_speak_of_it(tmp_path: Path) -> None:
    config = AdapterConfig(num_experts=E, top_k=2, top_k_warmup=9)
    write_adapter(tmp_path / "adapter", config, ["0"], {"x": torch.ones(1)}, "base", {}, lambda _: None)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["top_k"] == 2 and "top_k_warmup" not in written
