"""Proof that every adapter tensor takes part in training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsmoelora.optim import Segment, Shard, ShardOptimizer
from dsmoelora.parallel import comm


class AdapterWatch:
    """Records, while it is on, the gradient of every adapter tensor and how far its values have moved.

    Args:
        optimizer: bound; its shards are looked at just before each step
    """

    def __init__(self, optimizer: ShardOptimizer) -> None:
        self._optimizer = optimizer
        self._start: list[Tensor] = []
        self._grad_square: dict[str, Tensor] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def start(self) -> None:
        """Remember the values of now; from here on gradients are recorded."""
        self._start = [shard.tensor.detach().clone() for shard in self._optimizer.shards]
        self._hook = self._optimizer.register_step_pre_hook(self._record)

    def stop(self) -> dict[str, dict[str, float]]:
        """Switch off and report, for every adapter tensor, what happened since `start` (collective).

        Returns:
            by tensor name: `grad_norm`, the norm of its gradients of all applied steps put together (after clipping),
            and `moved`, the norm of its change
        """
        assert self._hook is not None, "start() comes first"
        self._hook.remove()
        names = [trainable.name for trainable in self._optimizer.trainables]
        moved = dict.fromkeys(names, 0.0)
        for shard, start in zip(self._optimizer.shards, self._start, strict=True):
            difference = (shard.tensor.detach() - start).view(-1)
            for segment in shard.segments:
                moved[segment.of.name] += float(difference[segment.span].square().sum()) / shard.num_copies
        grads = [float(self._grad_square.get(name, 0.0)) for name in names]
        self._start, self._grad_square = [], {}
        sums = comm.all_reduce_sum([*grads, *moved.values()])
        norms = [square**0.5 for square in sums]
        return {name: {"grad_norm": norms[i], "moved": norms[len(names) + i]} for i, name in enumerate(names)}

    def _record(self, *_: object) -> None:
        if self._optimizer.skip:  # this gradient is not applied, and may not be finite
            return
        for segment, grad, num_copies in self._segments_with_gradients():
            square = grad.square().sum() / num_copies
            self._grad_square[segment.of.name] = self._grad_square.get(segment.of.name, 0.0) + square

    def _segments_with_gradients(self) -> Iterator[tuple[Segment, Tensor, int]]:
        shards: list[Shard] = self._optimizer.shards
        for shard in shards:
            if shard.tensor.grad is not None:
                for segment in shard.segments:
                    yield segment, shard.tensor.grad.view(-1)[segment.span], shard.num_copies
