"""Traced without a GPU: whatever layer, loss and optimizer make lies on the device of the model.

The meta device stands for an accelerator: an operation that mixes it with the CPU fails. Fake tensors of a GPU cannot:
without one builds with CUDA abort in their backward pass, and builds without know too little of that device.
"""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dsmoelora.config.adapter_options import ExpertName, RouterName
from dsmoelora.optim import OptimConfig, build_optimizer, trainables
from tests.placement import adapted_linear

DEVICE = "meta"
LAYERS = list(product(get_args(ExpertName), get_args(RouterName)))


def loss_of(y_BSO: Tensor) -> Tensor:
    """As the engine sums it."""
    targets_T = torch.zeros(y_BSO.shape[0] * y_BSO.shape[1], dtype=torch.int64, device=y_BSO.device)
    return torch.nn.functional.cross_entropy(y_BSO.flatten(0, 1).float(), targets_T, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("expert", "router"), LAYERS)
def test_outputs_and_gradients_of_every_layer(expert: Any, router: Any) -> None:
    model, x_BSD = adapted_linear(expert, router, DEVICE)
    y_BSO = model.train()(x_BSD)
    loss = loss_of(y_BSO)
    loss.backward()
    grads = {of.name: parameter.grad for of, parameter in trainables(model)}
    assert_there({"y": y_BSO, "loss": loss, "x": x_BSD.grad, **grads, **dict(model.named_buffers())})


@pytest.mark.parametrize(("expert", "rule"), list(product(get_args(ExpertName), ["none", "scaled", "tangent"])))
def test_the_state_and_the_arithmetic_of_the_optimizer(expert: Any, rule: Any) -> None:
    """The host reads no number: tensors on the meta device have none."""
    damping = {} if rule == "none" else {"damping": 0.1, "damping_abs": 1e-3}
    config = OptimConfig(name="adamw", preconditioner=rule, **damping)  # torch cannot trace its fused SGD
    model, _ = adapted_linear(expert, "softmax_topk", DEVICE)
    optimizer = build_optimizer(model, config)
    for _, parameter in trainables(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    made: dict[str, Tensor | None] = {of.name: parameter for of, parameter in trainables(model)}
    for number, state in enumerate(optimizer.state.values()):
        made |= {f"{key} of {number}": moment for key, moment in state.items()}
    made |= {f"report {number}": report.square_norm for number, report in enumerate(optimizer.reports)}
    assert_there(made)


def assert_there(made: dict[str, Tensor | None]) -> None:
    assert {name: str(None if one is None else one.device) for name, one in made.items()} == dict.fromkeys(made, DEVICE)
