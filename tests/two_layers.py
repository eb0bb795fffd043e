"""A network of two adapted layers, for tests of what is added to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoelora import AdapterConfig, inject

WIDTH, NUM_EXPERTS = 16, 5


class TwoLayers(nn.Module):
    """Adapted layers WIDTH -> 24 -> WIDTH with random factors, computed again in the backward pass if asked."""

    def __init__(self, recompute: bool = False, **adapter: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.recompute = recompute
        settings = {"r": 2, "num_experts": NUM_EXPERTS, "target_modules": "all-linear"} | adapter
        inject(self, AdapterConfig(**settings))
        with torch.no_grad():
            trained = [p for name, p in self.named_parameters() if p.requires_grad and "magnitude" not in name]
            for number, parameter in enumerate(trained):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).tanh())
            return y

        return checkpoint(body, x, use_reentrant=False) if self.recompute else body(x)
