"""Who holds which elements: what the shards of ranks contain, without their numbers.

Pure bookkeeping on segments (see `optim.rows`), used the same way for the ranks that save, for the files of a
checkpoint, and for the ranks that load.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dsmoelora.adapters import Factor
from dsmoelora.errors import CheckpointError
from dsmoelora.optim.rows import Segment, Trainable


@dataclass(frozen=True)
class ShardLayout:
    """What one shard holds.

    Args:
        segments: its segments; offsets count from the start of its flat tensors
        dtypes: dtype of each of its flat tensors in safetensors' words, by the tensor's name (`value`, `exp_avg`)
    """

    segments: list[Segment]
    dtypes: dict[str, str]


class Ranges:
    """A set of whole numbers, kept as disjoint half-open ranges."""

    def __init__(self) -> None:
        self._edges: list[int] = []  # start, stop, start, stop ...; an odd number of edges to the left means inside

    def add(self, start: int, stop: int) -> None:
        """Take in `[start, stop)`; ranges that touch become one."""
        low, high = bisect_left(self._edges, start), bisect_right(self._edges, stop)
        self._edges[low:high] = [start] * (low % 2 == 0) + [stop] * (high % 2 == 0)

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of `[start, stop)` that are not in the set, in order."""
        low, high = bisect_right(self._edges, start), bisect_left(self._edges, stop)
        points = [start] * (low % 2 == 0) + self._edges[low:high] + [stop] * (high % 2 == 0)
        return list(zip(points[::2], points[1::2], strict=True))


def parameters_of(layouts: Iterable[ShardLayout]) -> dict[str, Trainable]:
    """The parameters of all segments, by name, in the order of their first segment.

    Raises:
        CheckpointError: two segments disagree about the shape or the role of a parameter, or one has no element
    """
    found: dict[str, Trainable] = {}
    for layout in layouts:
        for segment in layout.segments:
            known = found.setdefault(segment.of.name, segment.of)
            if known != segment.of:
                raise CheckpointError(f"Parameter {known.name} is described in two ways: {known} and {segment.of}.")
            if 0 in known.shape:
                raise CheckpointError(f"Parameter {known.name} is empty: its shape is {known.shape}.")
    return found


def without_duplicates(ranks: list[list[ShardLayout]]) -> list[list[ShardLayout]]:
    """Leave every element to the lowest rank that holds it, so that replicas are written once.

    Args:
        ranks: the shards of every rank, by rank

    Returns:
        The same shards with what remains of their segments; offsets are still those in the given shards.
    """
    taken: dict[str, Ranges] = {}
    return [[_take(layout, taken) for layout in layouts] for layouts in ranks]


def _take(layout: ShardLayout, taken: dict[str, Ranges]) -> ShardLayout:
    kept = []
    for segment in layout.segments:
        ranges = taken.setdefault(segment.of.name, Ranges())
        for start, stop in ranges.gaps(segment.start, segment.stop):
            kept.append(Segment(segment.of, start, stop, segment.offset + start - segment.start))
        ranges.add(segment.start, segment.stop)
    return ShardLayout(kept, layout.dtypes)


def packed(layout: ShardLayout) -> ShardLayout:
    """The same segments behind one another from offset 0: how they lie in a file, without padding."""
    segments, offset = [], 0
    for segment in layout.segments:
        segments.append(replace(segment, offset=offset))
        offset += segment.stop - segment.start
    return ShardLayout(segments, layout.dtypes)


def first_gap(layouts: Iterable[ShardLayout]) -> tuple[Trainable, int, int] | None:
    """A parameter and a range of its elements that no segment holds; None where every parameter is whole."""
    layouts = list(layouts)
    held: dict[str, Ranges] = {}
    for layout in layouts:
        for segment in layout.segments:
            held.setdefault(segment.of.name, Ranges()).add(segment.start, segment.stop)
    for name, parameter in parameters_of(layouts).items():
        gaps = held[name].gaps(0, math.prod(parameter.shape))
        if gaps:
            return parameter, *gaps[0]
    return None


def encode_parameters(parameters: dict[str, Trainable]) -> list[dict[str, Any]]:
    """Parameters as JSON; segments refer to them by their place in this list."""
    return [
        {"name": each.name, "layer": each.layer, "factor": each.factor.value, "shape": list(each.shape)}
        for each in parameters.values()
    ]


def encode_layouts(layouts: list[ShardLayout], parameters: dict[str, Trainable]) -> list[dict[str, Any]]:
    """Shards as JSON; a segment is `[place of the parameter, start, stop, offset]`."""
    places = {name: place for place, name in enumerate(parameters)}
    return [
        {
            "tensors": layout.dtypes,
            "segments": [
                [places[segment.of.name], segment.start, segment.stop, segment.offset] for segment in layout.segments
            ],
        }
        for layout in layouts
    ]


def decode_parameters(encoded: list[dict[str, Any]]) -> list[Trainable]:
    """The reverse of `encode_parameters`."""
    return [
        Trainable(each["name"], each["layer"], Factor(each["factor"]), tuple(int(n) for n in each["shape"]))
        for each in encoded
    ]


def decode_layouts(encoded: list[dict[str, Any]], parameters: list[Trainable]) -> list[ShardLayout]:
    """The reverse of `encode_layouts`."""
    return [
        ShardLayout(
            [Segment(parameters[place], start, stop, offset) for place, start, stop, offset in each["segments"]],
            dict(each["tensors"]),
        )
        for each in encoded
    ]
