"""PEFT's Riemannian optimizer as an independent oracle for `scaled`: one expert is a plain LoRA adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dsmoelora.adapters import RoutedLinear, adapted_layers
from dsmoelora.optim import OptimConfig, build_optimizer
from tests.riemannian_formula import relative_error
from tests.riemannian_problems import Network

peft = pytest.importorskip("peft")
riemannian = pytest.importorskip("peft.optimizers.riemannian", reason="needs a PEFT with create_riemannian_optimizer")

NUM_STEPS = 20
REG = 1e-2
# An eps of a noticeable size keeps Adam from turning rounding noise in tiny gradients into whole steps.
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
}


class Plain(nn.Module):
    """The base layers of a `Network`."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        layers: dict[str, RoutedLinear] = dict(adapted_layers(network))
        self.up, self.down = (
            nn.Linear(layers[name].base.in_features, layers[name].base.out_features) for name in layers
        )
        for name in layers:
            self.get_submodule(name).load_state_dict(layers[name].base.state_dict())

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(self.up(x_TD).tanh())
        return hidden


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x_TD, y_TO = torch.randn(64, 40, generator=generator), torch.randn(64, 30, generator=generator)
    model.zero_grad()
    (model(x_TD) - y_TO).square().sum(-1).mean().backward()


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("base", BASES)
def test_twenty_steps_equal_those_of_peft(base: str, start: str) -> None:
    """From b = 0, where every training begins, and from a b that is not."""
    ours = Network(r=3, lora_alpha=6, num_experts=1, top_k=1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"])
    theirs = peft.get_peft_model(Plain(ours), config)
    pairs = []
    for name, layer in adapted_layers(ours):
        if start == "zero":
            nn.init.zeros_(layer.experts.b)
        their_layer = theirs.get_submodule(f"base_model.model.{name}")
        their_a, their_b = their_layer.lora_A["default"].weight, their_layer.lora_B["default"].weight  # (R, D), (O, R)
        their_a.data.copy_(layer.experts.a[0].T)
        their_b.data.copy_(layer.experts.b[0])
        pairs += [(layer.experts.a, their_a.T), (layer.experts.b, their_b)]
    optimizer_class, settings = BASES[base]
    settings = {"weight_decay": 0.0} | settings
    their_optimizer = riemannian.create_riemannian_optimizer(theirs, optimizer_class, reg=REG, **settings)
    our_config = OptimConfig(
        name="sgd" if base.startswith("sgd") else "adamw",
        preconditioner="scaled",
        damping=0.0,
        damping_abs=REG,
        **settings,
    )
    our_optimizer = build_optimizer(ours, our_config)
    begin = [our.detach().clone() for our, _ in pairs]
    for step in range(NUM_STEPS):
        for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            set_gradients(model, step)
            optimizer.step()
    for (our, their), first in zip(pairs, begin, strict=True):
        assert (our - first).abs().max() > 1e-2 * our.abs().max(), "far enough to be measured"
        assert relative_error(our.detach()[0], their.detach()) <= 1e-5
