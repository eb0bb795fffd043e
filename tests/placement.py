"""Small adapted layers on any device, fake ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.config.adapter_options import ROUTERS

NUM_ROWS, LENGTH, WIDTH = 2, 5, 8


def adapted_linear(expert: Any, router: Any, device: str) -> tuple[nn.Module, Tensor]:
    """A linear layer with four experts on a device, told of its batch, and an input (rows, length, width)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 6))
    top_k = {"top_k": 2} if "top_k" in ROUTERS[router].options else {"top_k": None}
    inject(model, AdapterConfig(r=2, num_experts=4, target_modules="all-linear", expert=expert, router=router, **top_k))
    _move(model, device)
    context = adapter_context(model)
    real_BS = torch.ones(NUM_ROWS, LENGTH, dtype=torch.bool, device=device)
    context.tokens = BatchTokens(real_BS.int().cumsum(-1).int(), real_BS, prompt_BS=real_BS)
    return model, torch.randn(NUM_ROWS, LENGTH, WIDTH).to(device).requires_grad_()


def _move(model: nn.Module, device: str) -> None:
    """`model.to(device)`, which cannot exchange the numbers of a fake parameter: every parameter is made anew, once."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            if one not in made:
                made[one] = nn.Parameter(one.detach().to(device), requires_grad=one.requires_grad)
            setattr(module, name, made[one])
        for name, one in list(module.named_buffers(recurse=False)):
            setattr(module, name, one.to(device))
