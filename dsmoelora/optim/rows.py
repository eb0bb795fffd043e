"""Runs of rows: how a flat shard knows what its numbers are.

Every trainable tensor has *expert first, rank last* ((E, D, R), (E, O, R), (E, R, R), router (E, D)), so any slice of
the flattened tensor is a run of rows (the first and the last may be cut). A shard is a flat fp32 tensor that holds
several such runs behind one another; a run is named by the parameter and by its element range **in the tensor of all
experts**, whatever the world size or the placement. Optimizer, ZeRO and checkpoints speak of shards in these terms alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Factor(Enum):
    """The role of a trainable tensor in its layer."""

    A = "a"
    B = "b"
    ROUTER = "router"


@dataclass(frozen=True)
class Trainable:
    """One trainable tensor of an adapted layer, as it is before any partitioning.

    Args:
        name: qualified name in the model (`model.layers.0.self_attn.q_proj.experts.a`)
        layer: name of the adapted layer (`model.layers.0.self_attn.q_proj`)
        factor: its role there
        shape: shape over all experts; the first dim counts experts
    """

    name: str
    layer: str
    factor: Factor
    shape: tuple[int, ...]

    @property
    def row_size(self) -> int:
        """Numbers in a row: the last dim (R for factors)."""
        return self.shape[-1]


@dataclass(frozen=True)
class Run:
    """Elements `[start, stop)` of the flattened tensor `of`, lying at `offset` in a flat shard."""

    of: Trainable
    start: int
    stop: int
    offset: int

    @property
    def span(self) -> slice:
        """Where the run lies in its shard."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass
class Shard:
    """A flat tensor of this rank and what its numbers are.

    Args:
        flat: (N,) fp32 master values; whoever owns the gradient puts it into `flat.grad` before a step
        runs: in the order of their offsets; numbers outside every run are padding and mean nothing
    """

    flat: torch.Tensor
    runs: list[Run]
