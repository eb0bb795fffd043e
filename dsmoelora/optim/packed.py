"""One all-reduce for everything that the ranks of a process group must tell one another in an optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsmoelora.optim.rows import ShardGroup


class PackedBuffer:
    """Named tensors that lie in one flat fp32 tensor.

    Args:
        shapes: by name, in the order in which they lie
        device: where
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self.flat = torch.zeros(sum(map(math.prod, shapes.values())), device=device)
        parts = self.flat.split([math.prod(shape) for shape in shapes.values()])
        self._views = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, a view."""
        return self._views[name]


class Part(Protocol):
    """Something that changes gradients and needs sums over the ranks for it.

    Attributes:
        shapes: names and shapes of the tensors it packs
    """

    shapes: dict[str, tuple[int, ...]]

    def pack(self, buffer: PackedBuffer) -> None:
        """Write this rank's share into the zeroed buffer."""

    def finish(self, buffer: PackedBuffer) -> None:
        """Change the gradients, the buffer holding sums over all ranks now."""


class GroupStep:
    """What happens to the gradients of one process group, in the order of its parts, with one all-reduce.

    Args:
        group: shards and the way to the other ranks
        parts: may be none, and then nothing travels
    """

    def __init__(self, group: ShardGroup, parts: Sequence[Part]) -> None:
        shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
        self.buffer = PackedBuffer(shapes, group.shards[0].tensor.device)
        self._parts, self._all_reduce = parts, group.all_reduce

    def apply(self) -> None:
        """Change the gradients at hand (collective in the group)."""
        if not self._parts:
            return
        self.buffer.flat.zero_()
        for part in self._parts:
            part.pack(self.buffer)
        if self._all_reduce is not None and self.buffer.flat.numel():
            self._all_reduce(self.buffer.flat)
        for part in self._parts:
            part.finish(self.buffer)
