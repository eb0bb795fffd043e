"""Kernels of a layer, as `benchmarks/layer_kernels.py` counts them, stay as few as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.layer_kernels import layer_kernels
from dsmoelora.config import LossesConfig

LOSSES = LossesConfig(balance=0.01, z=0.001)


@pytest.mark.parametrize(
    ("at_most", "losses", "settings"),
    [
        pytest.param(16, None, {"num_experts": 1}, id="one-expert"),
        pytest.param(35, None, {}, id="routed"),
        pytest.param(53, LOSSES, {}, id="losses"),
        pytest.param(50, None, {"dtype": torch.bfloat16}, id="bf16"),
        pytest.param(48, None, {"lora_dropout": 0.1}, id="dropout"),
    ],
)
def test_a_layer_launches_no_more_kernels(at_most: int, losses: LossesConfig | None, settings: dict[str, Any]) -> None:
    forward, backward = layer_kernels(losses, **settings)
    assert 0 < len(forward) + len(backward) <= at_most, (forward, backward)
