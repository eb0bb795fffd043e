"""A router whose logits come out of the experts' own product changes no number of the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import LossesConfig

SHAPE = (3, 7, 16)


def run(joined: bool, dtype: torch.dtype, requires_grad: bool, settings: dict[str, Any]) -> dict[str, Tensor | None]:
    """Output, all gradients and what the routers' log heard, with balance and z losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    config = {"router": "softmax_topk", "num_experts": 5, "top_k": 2, "r": 3, "target_modules": "all-linear"} | settings
    inject(model, AdapterConfig(**config))
    ((_, layer),) = adapted_layers(model)
    assert layer._is_joined
    layer._is_joined = joined
    context = adapter_context(model.train())
    context.tokens = BatchTokens(real_BS=torch.rand(SHAPE[:2]) < 0.8)
    weights = LossesConfig(balance=0.3, z=0.2) if config["router"] != "softmax" else LossesConfig(z=0.2)
    log = RoutingLog(model, weights, torch.device("cpu"))
    log.begin_step(20, 1.0)
    if dtype is not torch.float64:  # which the log's sums over fp32 counts do not know
        context.log = log
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 3:
            parameter.data.normal_(generator=generator)
    x = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_(requires_grad)
    with log.listening():
        y = model(x)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"output": y.detach(), "x": x.grad, "log": log.sums} | grads


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "softmax", "top_k": None},
        {"router": "top_p", "top_k": None},
        {"router": "sigmoid_bias"},
        {"expert": "moslora"},
        {"shared_experts": 1},
        {"gate_power": 0.5},
        {"gate_power": 0.5, "gate_power_scope": "factors_and_input"},
        {"freeze": ["a"]},
        {"freeze": ["router"]},
        {"freeze": ["a", "router"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "topk",
)
def test_one_product_gives_what_two_give(dtype: torch.dtype, requires_grad: bool, settings: dict[str, Any]) -> None:
    found, wanted = (run(joined, dtype, requires_grad, settings) for joined in (True, False))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        reference = wanted[name]
        assert (value is None) == (reference is None), name
        assert (value is None) == (name == "x" and not requires_grad), name
        if value is not None and reference is not None:
            scale = reference.double().abs().max().item()
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.1},
        {"expert": "dora"},
        {"router": "prompt"},
        {"router": "noisy_topk"},
        {"num_experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_routers_that_look_at_something_else_decide_by_themselves(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, AdapterConfig(**{"num_experts": 4, "top_k": 2, "r": 2, "target_modules": "all-linear"} | settings))
    ((_, layer),) = adapted_layers(model)
    assert not layer.experts.joined_parameters
