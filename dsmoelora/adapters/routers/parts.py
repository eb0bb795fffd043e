"""What routers are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoelora.adapters.context import BatchContext
from dsmoelora.seeds import empty_start, generator


@dataclass(frozen=True)
class RouterPlace:
    """Where a router stands.

    Args:
        layer: name of its layer in the model
        in_features: D
        num_experts: E
        like: tensor whose dtype and device the parameters take
        seed: what the initial values derive from, together with the layer's name
        context: shared by all layers of the model
    """

    layer: str
    in_features: int
    num_experts: int
    like: Tensor
    seed: int
    context: BatchContext

    @property
    def shape(self) -> tuple[int, int]:
        """(E, D)."""
        return self.num_experts, self.in_features

    def uniform_start(self) -> nn.Parameter:
        """A weight (E, D), uniform within `D^-1/2`, as `nn.Linear` starts."""
        bound = self.in_features**-0.5
        start = empty_start(self.shape).uniform_(-bound, bound, generator=generator(self.seed, self.layer, "router"))
        return nn.Parameter(start.to(self.like.dtype).to(self.like.device))

    def zero_start(self, *shape: int) -> nn.Parameter:
        """A parameter that starts at zero."""
        return nn.Parameter(torch.zeros(shape, dtype=self.like.dtype, device=self.like.device))
