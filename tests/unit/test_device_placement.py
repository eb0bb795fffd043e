"""Traced without a GPU: whatever layer, loss and optimizer make lies on the device of the model.

The meta device stands for an accelerator: an operation that mixes it with the CPU fails. Where torch is built with
CUDA, fake tensors of a GPU are traced too; a build without knows too little of that device to make a tensor there.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmoelora.adapter_options import ExpertName, RouterName
from dsmoelora.optim import OptimConfig, build_optimizer, trainables
from tests.placement import adapted_linear

needs_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")
DEVICES = ["meta", pytest.param("cuda:0", marks=needs_build)]
LAYERS = list(product(get_args(ExpertName), get_args(RouterName)))


def loss_of(y_BSO: Tensor) -> Tensor:
    """As the engine sums it."""
    targets_T = torch.zeros(y_BSO.shape[0] * y_BSO.shape[1], dtype=torch.int64, device=y_BSO.device)
    return torch.nn.functional.cross_entropy(y_BSO.flatten(0, 1).float(), targets_T, ignore_index=-100, reduction="sum")


def fake(device: str) -> Any:
    """Fake tensors for a device that is not there; meta tensors are as good by themselves."""
    return nullcontext() if device == "meta" else FakeTensorMode()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("expert", "router"), LAYERS)
def test_outputs_and_gradients_of_every_layer(expert: Any, router: Any, device: str) -> None:
    with fake(device):
        model, x_BSD = adapted_linear(expert, router, device)
        y_BSO = model.train()(x_BSD)
        loss = loss_of(y_BSO)
        loss.backward()
        grads = {of.name: parameter.grad for of, parameter in trainables(model)}
        assert_on(device, {"y": y_BSO, "loss": loss, "x": x_BSD.grad, **grads, **dict(model.named_buffers())})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("expert", "rule"), list(product(get_args(ExpertName), ["none", "scaled", "tangent"])))
def test_the_state_and_the_arithmetic_of_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, expert: Any, rule: Any, device: str
) -> None:
    """Whether Cholesky failed is the one number that the host reads, and fake tensors have none."""
    reads: list[Tensor] = []
    monkeypatch.setattr(Tensor, "__int__", lambda tensor: reads.append(tensor) or 0)
    damping = {} if rule == "none" else {"damping": 0.1, "damping_abs": 1e-3}
    config = OptimConfig(name="adamw", preconditioner=rule, **damping)  # torch cannot trace its fused SGD
    with fake(device):
        model, _ = adapted_linear(expert, "softmax_topk", device)
        optimizer = build_optimizer(model, config)
        for _, parameter in trainables(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        made: dict[str, Tensor | None] = {of.name: parameter for of, parameter in trainables(model)}
        for number, state in enumerate(optimizer.state.values()):
            made |= {f"{key} of {number}": moment for key, moment in state.items()}
        made |= {f"report {number}": report.square_norm for number, report in enumerate(optimizer.reports)}
        assert_on(device, made)
    assert all(str(tensor.device) == device for tensor in reads) and bool(reads) == (rule != "none")


def assert_on(device: str, made: dict[str, Tensor | None]) -> None:
    assert {name: str(None if one is None else one.device) for name, one in made.items()} == dict.fromkeys(made, device)
