"""Clipping of the routers' gradient alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.optim.packed import PackedBuffer
from dsmoelora.optim.rows import ShardGroup, joined_spans


class RouterClip:
    """Scales the gradient of all routers together to a norm of at most `max_norm`, as Sun et al. do.

    Args:
        group: shards of one process group, which holds all routers
        max_norm: of the routers' gradient
    """

    def __init__(self, group: ShardGroup, max_norm: float) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {"router_square": (1,)}
        self._max_norm = max_norm
        self._spans = [
            (shard.tensor, span)
            for shard in group.shards
            for span in joined_spans(segment for segment in shard.segments if segment.of.factor is Factor.ROUTER)
        ]

    def _grads(self) -> list[Tensor]:
        grads = []
        for tensor, span in self._spans:
            assert tensor.grad is not None, "every trainable tensor takes part in every step"
            grads.append(tensor.grad.view(-1)[span])
        return grads

    def pack(self, buffer: PackedBuffer) -> None:
        """Add this rank's share of the squared norm."""
        grads = self._grads()
        if grads:
            buffer["router_square"].copy_(torch.stack(torch._foreach_norm(grads)).square().sum())

    def finish(self, buffer: PackedBuffer) -> None:
        """Scale down where the norm is above the limit."""
        norm = buffer["router_square"].sqrt()
        grads = self._grads()
        if grads:
            torch._foreach_mul_(grads, (self._max_norm / (norm + 1e-6)).clamp(max=1.0).squeeze())
