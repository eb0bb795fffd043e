"""Where the rows of the factors lie in this rank's shards, as few regular views.

ZeRO cuts tensors of one shape in one way, so what a rank holds of them repeats at a fixed distance from layer to
layer. A `Tile` is such a repetition: (layers, experts, rows, R) as one strided view of a flat shard. The number of
tiles, and with it the number of kernels, depends on how many *shapes* there are, not on how many layers or experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.optim.rows import Segment


@dataclass(frozen=True)
class Tile:
    """Whole rows of one role at regular distances in a flat shard.

    Args:
        factor: A or B
        offset: of the first number
        distance: numbers from one layer to the next
        num_experts: neighbouring experts of one layer, each with `num_rows` rows
        num_rows: rows of each expert
        rank: R
        slots: (layers * experts,) int64, the number of each expert's factor
    """

    factor: Factor
    offset: int
    distance: int
    num_experts: int
    num_rows: int
    rank: int
    slots: Tensor

    def chunks(self, flat: Tensor, max_numbers: int) -> Iterator[Tensor]:
        """Views (layers, experts, rows, R) of a flat shard, in the order of the slots.

        Args:
            flat: the shard
            max_numbers: numbers of a view at most: several layers, or some experts of one layer (one at least)
        """
        per_expert = self.num_rows * self.rank
        shape = (len(self.slots) // self.num_experts, self.num_experts, self.num_rows, self.rank)
        strides = (self.distance, per_expert, self.rank, 1)
        view = flat.as_strided(shape, strides, flat.storage_offset() + self.offset)
        if self.num_experts * per_expert <= max_numbers:
            yield from view.split(max_numbers // (self.num_experts * per_expert))
        else:
            for layer in view.split(1):
                yield from layer.split(max(1, max_numbers // per_expert), dim=1)


@dataclass(frozen=True)
class _Piece:
    """Rows of neighbouring experts in one segment: what repeats from layer to layer."""

    factor: Factor
    first_expert: int
    num_experts: int
    num_rows: int
    first_row: int
    rank: int


def tiles(segments: Iterable[Segment], first_slot: dict[tuple[str, Factor], int], device: torch.device) -> list[Tile]:
    """The tiles that cover every whole row of factors in a shard.

    Args:
        segments: of one shard
        first_slot: number of the factor of expert 0, by layer and role
        device: of the tiles' index tensors
    """
    found: dict[_Piece, list[tuple[int, int]]] = {}
    for segment in segments:
        if segment.of.factor in (Factor.A, Factor.B):
            for piece, offset in _pieces(segment):
                slot = first_slot[segment.of.layer, segment.of.factor] + piece.first_expert
                found.setdefault(piece, []).append((offset, slot))
    return [
        _tile(piece, progression, device)
        for piece, places in found.items()
        for progression in _progressions(sorted(places))
    ]


def _pieces(segment: Segment) -> Iterator[tuple[_Piece, int]]:
    """Head (the end of a cut expert), whole experts, and tail (the start of one) of a segment, with their offsets."""
    _, num_rows, rank = segment.of.shape
    first, last = -(-segment.start // rank), segment.stop // rank
    while first < last:
        expert, row = divmod(first, num_rows)
        whole = (last - first) // num_rows if row == 0 else 0
        count = whole or 1
        rows = num_rows if whole else min(num_rows - row, last - first)
        yield (
            _Piece(segment.of.factor, expert, count, rows, row, rank),
            segment.offset + first * rank - segment.start,
        )
        first += count * rows


def _progressions(places: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Split (offset, slot) places, in order, into arithmetic progressions of offsets."""
    current: list[tuple[int, int]] = []
    for place in places:
        if len(current) >= 2 and place[0] - current[-1][0] != current[1][0] - current[0][0]:
            yield current
            current = []
        current.append(place)
    if current:
        yield current


def _tile(piece: _Piece, places: list[tuple[int, int]], device: torch.device) -> Tile:
    distance = places[1][0] - places[0][0] if len(places) > 1 else 0
    first = torch.tensor([slot for _, slot in places], device=device)
    slots = (first[:, None] + torch.arange(piece.num_experts, device=device)).flatten()
    return Tile(piece.factor, places[0][0], distance, piece.num_experts, piece.num_rows, piece.rank, slots)
