"""A router that makes the experts' features in the product of its logits changes no number of the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers

SHAPE = (3, 7, 16)


def output_and_gradients(joined: bool, dtype: torch.dtype, requires_grad: bool, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    config = {"num_experts": 5, "top_k": 2, "r": 3, "target_modules": "all-linear"} | settings
    inject(model, AdapterConfig(**config))
    ((_, layer),) = adapted_layers(model)
    assert bool(layer.router.joined_factors) is True
    if not joined:
        layer.router._bank = ()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 3:
            parameter.data.normal_(generator=generator)
    x = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_(requires_grad)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "softmax", "top_k": None},
        {"router": "noisy_topk"},
        {"router": "threshold", "top_k": None},
        {"router": "sigmoid_bias"},
        {"num_experts": 1, "top_k": 1},
        {"expert": "moslora"},
        {"expert": "dora"},
        {"gate_power": 0.5},
        {"gate_power": 0.5, "gate_power_scope": "factors_and_input"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "topk",
)
def test_one_product_gives_what_two_give(dtype: torch.dtype, requires_grad: bool, settings: dict[str, Any]) -> None:
    found, wanted = (output_and_gradients(joined, dtype, requires_grad, settings) for joined in (True, False))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]

    def check(value: Tensor | None, reference: Tensor | None, name: str) -> None:
        assert (value is None) == (reference is None), name
        if value is not None and reference is not None:
            scale = reference.double().abs().max().item()
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance * scale, msg=name)

    check(found[0], wanted[0], "output")
    check(found[1], wanted[1], "x")
    assert found[2].keys() == wanted[2].keys()
    for name, grad in found[2].items():
        assert grad is not None, name
        check(grad, wanted[2][name], name)


def test_experts_that_read_something_else_make_their_features_themselves() -> None:
    for settings in ({"lora_dropout": 0.1}, {"router": "prompt"}):
        model = nn.Sequential(nn.Linear(8, 8))
        inject(model, AdapterConfig(num_experts=4, top_k=2, r=2, target_modules="all-linear", **settings))
        ((_, layer),) = adapted_layers(model)
        assert not getattr(layer.router, "joined_factors", [])
