"""Inputs, bases and adapters of different dtypes, as training loops of one's own have them."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.config.adapter_options import ExpertName, RouterName
from dsmoelora.optim import OptimConfig, build_optimizer
from tests.helpers import tiny_llama

IDS_BS = torch.randint(4, 260, (2, 10), generator=torch.Generator().manual_seed(0))
PAIRS = list(product(get_args(ExpertName), get_args(RouterName)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path_factory.mktemp("base"), attention_bias=True))


def adapted(base: Any, dtype: torch.dtype, expert: Any, router: Any) -> Any:
    """With experts that have learned something, of the same numbers in every dtype."""
    model = copy.deepcopy(base).to(torch.bfloat16).to(dtype)
    targets = ["q_proj", "up_proj"]
    inject(model, AdapterConfig(r=3, num_experts=5, expert=expert, router=router, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.1).bfloat16())
    return model.train()


def learn(model: Any, autocast: bool = False) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients that it leaves."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(IDS_BS, labels=IDS_BS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("expert", "router"), PAIRS)
def test_every_mixture_of_dtypes_learns_the_same(base: Any, expert: Any, router: Any) -> None:
    expected, grads = learn(adapted(base, torch.float32, expert, router))
    under_autocast = learn(adapted(base, torch.float32, expert, router), autocast=True)
    above_bf16 = adapted(base, torch.bfloat16, expert, router)
    optimizer = build_optimizer(above_bf16, OptimConfig())  # keeps the adapter in fp32, as PEFT does
    for loss, found in (under_autocast, learn(above_bf16)):
        assert loss == pytest.approx(expected, rel=0.02)
        assert found.keys() == grads.keys()
        for name, grad in found.items():
            assert grad.dtype == torch.float32, name
        both = [torch.cat([each[name].flatten() for name in grads]) for each in (found, grads)]
        assert torch.cosine_similarity(*both, dim=0) > 0.9  # a token near a border may choose otherwise in bf16
    before = {name: p.detach().clone() for name, p in above_bf16.named_parameters() if p.requires_grad}
    optimizer.step()
    assert all(bool((value != before[n]).any()) for n, value in above_bf16.named_parameters() if n in before)


@pytest.mark.parametrize("expert", get_args(ExpertName))
def test_one_dtype_is_left_alone(base: Any, expert: Any) -> None:
    """No copy of a parameter: under ZeRO-3 it would keep the gathered one alive."""
    model = adapted(base, torch.float32, expert, "softmax_topk")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(IDS_BS)
    held = {tensor.data_ptr() for tensor in saved}
    factors = [p for name, p in model.named_parameters() if name.endswith((".experts.a", ".experts.b"))]
    assert factors and all(factor.data_ptr() in held for factor in factors)
