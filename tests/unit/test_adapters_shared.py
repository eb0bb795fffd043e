"""Experts that every token uses beside those that a router chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.starts.gradient import gradient_start
from dsmoelora.config.adapter_options import ROUTERS, RouterName
from tests.helpers import tiny_llama
from tests.plain_gradient_start import start_plainly

E, SHARED = 4, 2


def adapted(**settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).double()
    defaults = {"r": 3, "num_experts": E, "shared_experts": SHARED, "target_modules": "all-linear"}
    inject(model, AdapterConfig(**defaults | settings))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 3:
            parameter.data.normal_()
    ((_, layer),) = adapted_layers(model)
    return model, layer


def plain_layer(layer: Any, x_TD: Tensor, gate_TE: Tensor) -> Tensor:
    """An expert after the other; those behind the last gate have gate 1."""
    bank = layer.experts
    y_TO = layer.base(x_TD)
    for expert, (a_DR, b_OR) in enumerate(zip(bank.a, bank.b, strict=True)):
        out_OR = b_OR if bank.m is None else b_OR @ bank.m[expert].T
        gate_T1 = gate_TE[:, expert : expert + 1] if expert < E else torch.ones(len(x_TD), 1)
        y_TO = y_TO + bank.scale * gate_T1 * ((x_TD @ a_DR) @ out_OR.T)
    return y_TO


CASES: list[dict[str, Any]] = [{"router": router} for router in get_args(RouterName)] + [{"expert": "moslora"}]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
def test_a_layer_adds_them_with_gate_1(settings: dict[str, Any], lora_dropout: float) -> None:
    """Outputs and all gradients, for every router; with dropout in evaluation, where features are made elsewhere."""
    options = ROUTERS[settings.get("router", "softmax_topk")].options
    model, layer = adapted(**settings, top_k=2 if "top_k" in options else None, lora_dropout=lora_dropout)
    model.train(not lora_dropout)
    gates: list[Tensor] = []
    layer.context.hooked = True
    layer.router.register_forward_hook(lambda _, __, routed: gates.append(routed))
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    y = model(x)
    found = torch.autograd.grad((y * weights).sum(), wanted, retain_graph=True, allow_unused=True)
    gate_TE = gates[0].expand(10, E) if len(gates[0]) == 10 else gates[0].repeat_interleave(5, 0)
    assert gate_TE.shape == (10, E), "no router knows of shared experts"
    expected_y = plain_layer(layer, x.flatten(0, 1), gate_TE).view_as(y)
    torch.testing.assert_close(y, expected_y, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad((expected_y * weights).sum(), wanted, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_layers_of_plain_lora_have_none() -> None:
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    inject(model, AdapterConfig(r=2, num_experts=E, shared_experts=1, target_modules=["one"], lora_modules=["two"]))
    assert {name: layer.experts.a.shape[0] for name, layer in adapted_layers(model)} == {"one": E + 1, "two": 1}


def test_they_change_no_draw_of_the_others() -> None:
    """So that runs with and without them can be compared."""
    (_, without), (_, with_them) = adapted(shared_experts=0), adapted()
    assert torch.equal(without.router.weight, with_them.router.weight)
    (_, without), (_, with_them) = (_fresh(count) for count in (0, SHARED))
    assert torch.equal(without.experts.a, with_them.experts.a[:E])


def _fresh(count: int) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(16, 12))
    inject(model, AdapterConfig(r=3, num_experts=E, shared_experts=count, target_modules="all-linear"))
    ((_, layer),) = adapted_layers(model)
    return model, layer


@pytest.mark.parametrize("spread", ["joint", "per_expert"])
def test_they_start_from_the_whole_gradient(tmp_path: Path, spread: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, initializer_range=0.2), dtype=torch.float64)
    sizes = {"r": 3, "num_experts": E, "top_k": 2, "shared_experts": 1}
    config = AdapterConfig(**sizes, target_modules=["q_proj", "down_proj"], init="gradient", init_spread=spread)  # type: ignore[arg-type]
    inject(model, config)
    ids = torch.arange(4, 124).view(4, 30)
    before = {name: layer.experts.b.detach().clone() for name, layer in adapted_layers(model)}
    model(ids, labels=ids).loss.backward()
    gradient_start(model, config)
    found = {name: layer.experts.a.detach().clone() for name, layer in adapted_layers(model)}
    for name, layer in adapted_layers(model):
        layer.experts.a.data.zero_()
        layer.experts.b.data.copy_(before[name])
    assert max(start_plainly(model, config, lambda: model(ids, labels=ids).loss)) < 1e3
    for name, layer in adapted_layers(model):
        expected = layer.experts.a.detach()
        assert (found[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
