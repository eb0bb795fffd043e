"""The optimizer in a training loop of one's own, as torch's optimizers are used there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.optim import OptimConfig, ShardOptimizer, build_optimizer
from tests.unit.test_optim import base_path, make_model, set_gradients, weights_of

__all__ = ["base_path"]  # a fixture

DAMPED = {"damping": 0.1, "damping_abs": 1e-3}
CONFIGS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
    {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    {"name": "adamw", "lr": 3e-3, "preconditioner": "tangent", "max_grad_norm_router": 1.0, **DAMPED},
]


def train(model: Any, optimizer: ShardOptimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_state_goes_on_as_if_nothing_had_happened(base_path: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    straight, broken = make_model(base_path), make_model(base_path)
    train(straight, build_optimizer(straight, OptimConfig(**config)), range(8))
    optimizer = build_optimizer(broken, OptimConfig(**config))
    train(broken, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer = build_optimizer(broken, OptimConfig(**config))
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(broken, optimizer, range(5, 8))
    for name, value in weights_of(straight).items():
        assert torch.equal(value, weights_of(broken)[name]), name


def test_a_closure_computes_the_gradients_and_its_loss_is_returned(base_path: Path) -> None:
    model, same = make_model(base_path), make_model(base_path)
    optimizer = build_optimizer(model, OptimConfig())

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        set_gradients(model, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    train(same, build_optimizer(same, OptimConfig()), range(1))
    for name, value in weights_of(same).items():
        assert torch.equal(value, weights_of(model)[name]), name


@pytest.mark.parametrize("config", CONFIGS)
def test_what_has_no_gradient_stays_as_it_is(base_path: Path, config: dict[str, Any]) -> None:
    """A layer that took no part in a step; torch's optimizers pass over it, weight decay and all."""
    model, whole = make_model(base_path), make_model(base_path)
    optimizer = build_optimizer(model, OptimConfig(**config))
    train(whole, build_optimizer(whole, OptimConfig(**config)), range(1))
    set_gradients(model, 0)
    absent = {name for name in weights_of(model) if name.startswith("model.layers.1.")}
    for name in absent:
        model.get_parameter(name).grad = None
    before = {name: value.clone() for name, value in weights_of(model).items()}
    optimizer.step()
    for name, value in weights_of(model).items():
        if name in absent:
            assert torch.equal(value, before[name]) and model.get_parameter(name).grad is None, name
        elif "max_grad_norm_router" not in config:  # which is of all routers
            assert torch.equal(value, weights_of(whole)[name]), name
