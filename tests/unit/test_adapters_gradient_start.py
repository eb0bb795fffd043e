"""Experts that start from the gradient, on plain tensors, against the whole gradient and its SVD."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.starts.gradient import gradient_start, missing_below, orthogonal
from tests.helpers import tiny_llama
from tests.plain_gradient_start import COLUMN_LENGTH, start_plainly

IDS = torch.arange(4, 124).view(4, 30)
STYLES: dict[str, dict[str, Any]] = {
    "joint": {},
    "per_expert": {"init_spread": "per_expert"},
    "mixer": {"expert": "moslora"},
    "lengths": {"expert": "dora"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "plain LoRA beside": {"lora_modules": ["o_proj"]},
    "power of the gate": {"gate_power": 0.5},
}


def config_of(**settings: Any) -> AdapterConfig:
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init": "gradient"}
    return AdapterConfig(**{"r": 3, "num_experts": 4, "top_k": 2, **targets} | settings)


def base_of(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(folder, initializer_range=0.2), dtype=dtype)


def loss_of(model: Any) -> Tensor:
    found: Tensor = model(IDS, labels=IDS).loss
    return found


def started(model: Any, config: AdapterConfig) -> dict[str, Tensor]:
    loss_of(model).backward()
    gradient_start(model, config)
    return {name: layer.experts.a.detach() for name, layer in adapted_layers(model)}


@pytest.mark.parametrize("settings", STYLES.values(), ids=STYLES)
def test_a_starts_from_the_whole_gradient_and_the_model_is_the_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    model, config = base_of(tmp_path), config_of(**settings)
    with torch.no_grad():
        expected_logits = model(IDS).logits
    inject(model, config)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected_logits), "a is 0"
    reference = copy.deepcopy(model)
    found = started(model, config)
    assert max(start_plainly(reference, config, lambda: loss_of(reference))) < 1e3
    for name, layer in adapted_layers(reference):
        expected = layer.experts.a.detach()
        assert (found[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected_logits), "b is 0"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_joint_directions_are_shared_by_no_two_experts_of_a_layer(tmp_path: Path) -> None:
    """And per expert they are shared: what the choice is about."""
    overlap = {}
    for spread in ("joint", "per_expert"):
        config = config_of(init_spread=spread)
        model = base_of(tmp_path)
        inject(model, config)
        for a_EDR in started(model, config).values():
            joined_DF = torch.cat(list(a_EDR), dim=1)
            gram_FF = joined_DF.T @ joined_DF / COLUMN_LENGTH**2
            for block_RR in (gram_FF[k : k + 3, k : k + 3] for k in range(0, 12, 3)):
                torch.testing.assert_close(block_RR, torch.eye(3).double(), rtol=0, atol=1e-5)
            overlap[spread] = float((gram_FF - torch.eye(12)).abs().max())
    assert overlap["joint"] < 1e-5 < 0.1 < overlap["per_expert"]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", ["joint", "per_expert"])
def test_what_a_sketch_does_not_have_is_drawn(spread: Any) -> None:
    """Expert 1 has no token and keeps its draw; expert 2 has a single one, and so one direction of the gradient."""
    sketch_EDR, draw_EDR = draws(3, 20, 4), draws(3, 20, 4, seed=1)
    sketch_EDR[1] = 0
    x_D, weights_R = draws(20, seed=2), draws(4, seed=3)
    sketch_EDR[2] = torch.outer(x_D, weights_R)
    a_EDR, num_drawn = orthogonal(sketch_EDR, draw_EDR, spread, missing_below(torch.float32))
    assert int(num_drawn) == 4 + 3
    torch.testing.assert_close(a_EDR[1], draw_EDR[1], rtol=0, atol=1e-6)
    v_R = weights_R / weights_R.norm()
    rest_RR = torch.eye(4) - torch.outer(v_R, v_R)
    torch.testing.assert_close(a_EDR[2] @ rest_RR, draw_EDR[2] @ rest_RR, rtol=0, atol=1e-5)
    if spread == "per_expert":
        torch.testing.assert_close(a_EDR[2] @ v_R, COLUMN_LENGTH * x_D / x_D.norm(), rtol=0, atol=1e-5)
    else:
        both_DC = torch.cat((a_EDR[0], (a_EDR[2] @ v_R).unsqueeze(1)), dim=1)
        torch.testing.assert_close(both_DC.T @ both_DC, torch.eye(5) / 3, rtol=0, atol=1e-5)


def test_more_directions_than_a_layer_has_are_drawn() -> None:
    a_EDR, num_drawn = orthogonal(draws(5, 8, 4), draws(5, 8, 4, seed=1), "joint", missing_below(torch.float32))
    assert int(num_drawn) == 5 * 4 - 8
    assert torch.isfinite(a_EDR).all()


def test_the_size_of_a_gradient_does_not_count() -> None:
    sketch_EDR, draw_EDR = draws(3, 20, 4), draws(3, 20, 4, seed=1)
    expected, _ = orthogonal(sketch_EDR, draw_EDR, "joint", 1e-5)
    sizes_E11 = torch.tensor([1e-20, 1.0, 1e12])[:, None, None]
    found, _ = orthogonal(sizes_E11 * sketch_EDR, draw_EDR, "joint", 1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_draw_has_columns_as_long_as_a_start(tmp_path: Path) -> None:
    model = base_of(tmp_path)
    inject(model, dataclasses.replace(config_of(num_experts=20), init="kaiming"))
    lengths = [layer.experts.a.detach().norm(dim=1).mean() for _, layer in adapted_layers(model)]
    torch.testing.assert_close(torch.stack(lengths).mean().item(), COLUMN_LENGTH, rtol=0.02, atol=0)
