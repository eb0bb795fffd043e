"""Segments of rows: how a flat shard knows what its numbers are.

Every trainable tensor has *expert first, rank last* ((E, D, R), (E, O, R), (E, R, R), router (E, D)), so any slice of
the flattened tensor is a segment of rows (the first and the last may be cut). A shard is a flat fp32 tensor that holds
several such segments behind one another; a segment is named by the parameter and by its element range **in the tensor
of all experts**, whatever the world size or the placement. Optimizer, ZeRO and checkpoints speak in these terms alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.adapters.routers import routers


@dataclass(frozen=True)
class Trainable:
    """One trainable tensor of an adapted model, as it is before any partitioning.

    Args:
        name: qualified name in the model (`model.layers.0.self_attn.q_proj.experts.a`)
        layer: name of the adapted layer (`model.layers.0.self_attn.q_proj`), or of the block that a router serves
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
class Segment:
    """Elements `[start, stop)` of the flattened tensor `of`, lying at `offset` in a flat shard."""

    of: Trainable
    start: int
    stop: int
    offset: int

    @property
    def span(self) -> slice:
        """Where the segment lies in its shard."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass
class Shard:
    """A contiguous tensor of this rank and what its numbers are.

    Args:
        tensor: fp32 master values: a flat (N,) partition, or a whole parameter; whoever owns the gradient puts it
            into `tensor.grad` before a step
        segments: in the order of their offsets in the flattened tensor; numbers outside every segment are padding
            and mean nothing
        num_copies: ranks that hold these same numbers; 1 where they are partitioned
    """

    tensor: torch.Tensor
    segments: list[Segment]
    num_copies: int = 1


@dataclass
class ShardGroup:
    """Everything of one process group that this rank holds, and the way to the other ranks.

    Args:
        trainables: the tensors that the group shares out, the same list on all its ranks
        shards: what this rank holds of them
        cut_rows: rows of factors that a shard boundary cuts on any rank, the same list on all ranks of the group
        all_reduce: sums a flat tensor over the group in place; None for a group of one rank
        experts: the experts of each tensor that the group holds; None for all
        num_ranks: of the group
    """

    trainables: list[Trainable]
    shards: list[Shard]
    cut_rows: list[tuple[Trainable, int]] = field(default_factory=list)
    all_reduce: Callable[[torch.Tensor], None] | None = None
    experts: range | None = None
    num_ranks: int = 1


class JoinedShards:
    """The shards of a group as one flat shard, so that what repeats from shard to shard is worked on at once.

    Args:
        shards: of one group

    Attributes:
        segments: of all, behind one another
        num_copies: ranks that hold these same numbers
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        (self.num_copies,) = {shard.num_copies for shard in shards}
        self._tensors = [shard.tensor for shard in shards]
        starts = accumulate((tensor.numel() for tensor in self._tensors), initial=0)
        self.segments = [
            replace(segment, offset=start + segment.offset)
            for start, shard in zip(starts, shards, strict=False)
            for segment in shard.segments
        ]

    @property
    def value(self) -> torch.Tensor:
        """(N,): the shard itself, or a copy of several."""
        return _flat([tensor.detach() for tensor in self._tensors])

    @property
    def grad(self) -> torch.Tensor:
        """(N,): likewise."""
        return _flat(self._grads())

    def put_grad(self, grad: torch.Tensor) -> None:
        """Make it the shards' gradient, which it is already where there is one shard."""
        if len(self._tensors) > 1:
            own = self._grads()
            parts = grad.split([tensor.numel() for tensor in own])
            torch._foreach_copy_(own, [part.view_as(tensor) for part, tensor in zip(parts, own, strict=True)])

    def _grads(self) -> list[torch.Tensor]:
        grads = [tensor.grad for tensor in self._tensors if tensor.grad is not None]
        assert len(grads) == len(self._tensors), "every trainable tensor takes part in every step"
        return grads


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    flats = [tensor.view(-1) for tensor in tensors]
    return flats[0] if len(flats) == 1 else torch.cat(flats)


def joined_spans(segments: Iterable[Segment]) -> list[slice]:
    """Where segments lie in their shard, neighbours joined."""
    spans: list[slice] = []
    for segment in segments:
        if spans and spans[-1].stop == segment.span.start:
            spans[-1] = slice(spans[-1].start, segment.span.stop)
        else:
            spans.append(segment.span)
    return spans


def rows_cut_by(segments: Iterable[Segment]) -> list[tuple[str, int]]:
    """Name and number of each row that begins or ends outside its segment."""
    ends = [(segment.of, end) for segment in segments for end in (segment.start, segment.stop)]
    return sorted({(of.name, end // of.row_size) for of, end in ends if end % of.row_size})


def adapter_tensors(model: nn.Module) -> list[tuple[Trainable, nn.Parameter]]:
    """Every tensor of the adapters on a model, trained or frozen (`adapter.freeze`), and the parameter that holds it.

    Ordered by role and shape, then as in the model: what ZeRO cuts in one way lies side by side in its partitions.
    """
    parts = [(layer, "experts", adapted.experts) for layer, adapted in adapted_layers(model)]
    parts += [(layer, "router", router) for layer, router in routers(model)]
    found = []
    for layer, part, module in parts:
        for name, parameter in module.named_parameters():
            factor = Factor.ROUTER if part == "router" else Factor(name)
            found.append((Trainable(f"{layer}.{part}.{name}", layer, factor, module.shapes[name]), parameter))
    return sorted(found, key=lambda one: (one[0].factor.value, one[0].shape))


def trainables(model: nn.Module) -> list[tuple[Trainable, nn.Parameter]]:
    """Those of `adapter_tensors` that are trained."""
    return [(trainable, parameter) for trainable, parameter in adapter_tensors(model) if parameter.requires_grad]


def frozen_tensors(model: nn.Module) -> list[tuple[Trainable, nn.Parameter]]:
    """Those of `adapter_tensors` that stay as they are."""
    return [(trainable, parameter) for trainable, parameter in adapter_tensors(model) if not parameter.requires_grad]


def whole(trainable: Trainable, parameter: torch.Tensor, num_copies: int = 1) -> Shard:
    """The shard of a parameter that is not partitioned."""
    return Shard(parameter, [Segment(trainable, 0, math.prod(trainable.shape), 0)], num_copies)
