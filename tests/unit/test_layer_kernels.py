"""Kernels of a layer and what it keeps, as `benchmarks/layer_kernels.py` counts them, stay as few as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.layer_kernels import NUM_EXPERTS, RANK, layer_cost, log_cost, peft_cost
from dsmoelora.config import LossesConfig

LOSSES = LossesConfig(balance=0.01, z=0.001)


@pytest.mark.parametrize(
    ("at_most", "losses", "settings"),
    [
        pytest.param(11, None, {"num_experts": 1}, id="one-expert"),
        pytest.param(26, None, {}, id="routed"),
        pytest.param(34, LOSSES, {}, id="losses"),
        pytest.param(32, None, {"dtype": torch.bfloat16}, id="bf16"),
        pytest.param(42, None, {"lora_dropout": 0.1}, id="dropout"),
    ],
)
def test_a_layer_launches_no_more_kernels(at_most: int, losses: LossesConfig | None, settings: dict[str, Any]) -> None:
    cost = layer_cost(losses, **settings)
    assert 0 < len(cost.forward) + len(cost.backward) <= at_most, (cost.forward, cost.backward)


@pytest.mark.parametrize("losses", [None, LOSSES])
def test_the_log_takes_as_many_kernels_for_many_layers_as_for_few(losses: LossesConfig | None) -> None:
    few, many = log_cost(2, losses), log_cost(20, losses)
    assert 0 < len(few) == len(many), (few, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("losses", "more"), [(None, 4), (LOSSES, 8)], ids=["gates", "gates-and-logits"])
def test_a_layer_keeps_little_beside_what_peft_keeps(
    losses: LossesConfig | None, more: int, dtype: torch.dtype
) -> None:
    features = NUM_EXPERTS * RANK * dtype.itemsize
    assert peft_cost(dtype).kept_bytes == features
    assert features < layer_cost(losses, dtype=dtype).kept_bytes <= features + more * NUM_EXPERTS
