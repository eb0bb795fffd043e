"""What goes into an adapter folder leaves the model by one copy a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoelora import AdapterConfig, inject
from dsmoelora.optim import trainables
from dsmoelora.parallel.adapter_tensors import tensors_on_rank_0
from dsmoelora.parallel.placement import ExpertPlacement


class Copies(TorchDispatchMode):
    """How many tensors were copied, to another device or in place."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
        return func(*args, **(kwargs or {}))


def test_every_tensor_is_copied_once_and_lives_apart_from_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject(model, AdapterConfig(r=2, num_experts=3, top_k=1, router="sigmoid_bias", target_modules="all-linear"))
    with Copies() as copies:
        tensors = tensors_on_rank_0(model, ExpertPlacement(3, 1, 1, 0))
    assert copies.count == len(tensors) > len(trainables(model)), "a and b, the router and its bias"
    for _, parameter in trainables(model):
        parameter.data.fill_(7.0)
    assert not any((tensor == 7.0).any() for tensor in tensors.values())
