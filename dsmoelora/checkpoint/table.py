"""Who holds which elements, of all ranks or all files at once: a table with a row for each segment.

W ranks that cut T tensors have W T segments, 690,000 for 1,024 ranks and a model of 7B. So columns are worked on as a
whole, and only segments that overlap in part are looked at one by one.
"""

from __future__ import annotations

import math
import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmoelora.checkpoint.layout import NUM_BYTES, ShardLayout
from dsmoelora.errors import CheckpointError
from dsmoelora.optim.rows import Trainable

Column = NDArray[np.int64]
COLUMNS = ("file", "shard", "parameter", "start", "stop", "offset", "kind")


@dataclass(frozen=True)
class Table:
    """Segments of all parameters.

    Args:
        parameters: what they are of
        kinds: dtype of each flat tensor of a shard in safetensors' words, by the tensor's name (`value`, `exp_avg`)
        rows: (N, 7), a segment in each, by file and shard: rank or file, shard there, place in `parameters`, elements
            `[start, stop)`, offset in the shard, place in `kinds`
    """

    parameters: list[Trainable]
    kinds: list[dict[str, str]]
    rows: Column

    def column(self, name: str) -> Column:
        """(N,): one of `COLUMNS`."""
        found: Column = self.rows[:, COLUMNS.index(name)]
        return found

    def with_columns(self, **columns: Column) -> Table:
        """The same with other columns."""
        rows = self.rows.copy()
        for name, column in columns.items():
            rows[:, COLUMNS.index(name)] = column
        return replace(self, rows=rows)

    def only(self, which: Any) -> Table:
        """Some of the rows, by mask or number."""
        return replace(self, rows=self.rows[which])

    @property
    def bases(self) -> Column:
        """(P + 1,): where each parameter begins, if all of them lay behind one another."""
        return np.array(list(accumulate((math.prod(of.shape) for of in self.parameters), initial=0)), dtype=np.int64)

    @property
    def spans(self) -> tuple[Column, Column]:
        """(N,), (N,): where segments begin and end, if all parameters lay behind one another."""
        first = self.bases[self.column("parameter")]
        return first + self.column("start"), first + self.column("stop")

    @property
    def num_bytes(self) -> int:
        """Of the numbers in all segments."""
        of_kind = np.array([sum(NUM_BYTES[name] for name in kind.values()) for kind in self.kinds], dtype=np.int64)
        return int(((self.column("stop") - self.column("start")) * of_kind[self.column("kind")]).sum())

    @property
    def kind_of(self) -> dict[str, dict[str, str]]:
        """The tensors kept for each parameter, by its name.

        Raises:
            CheckpointError: they are others in another part of the same parameter
        """
        found: dict[str, dict[str, str]] = {}
        for both in np.unique(self.column("parameter") * len(self.kinds) + self.column("kind")).tolist():
            place, kind = divmod(both, len(self.kinds))
            name = self.parameters[place].name
            known = found.setdefault(name, self.kinds[kind])
            if known != self.kinds[kind]:
                raise CheckpointError(
                    f"Parts of {name} have different tensors: {known} in one shard, {self.kinds[kind]} in another."
                )
        return found


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


def as_text(rows: list[list[int]]) -> str:
    """Rows for JSON, in a tenth of the time that their numbers would take one by one."""
    return b64encode(zlib.compress(np.array(rows, dtype=np.int64).tobytes(), level=1)).decode()


def from_text(text: str) -> Column:
    """(N, 7): the reverse of `as_text`."""
    return np.frombuffer(zlib.decompress(b64decode(text)), dtype=np.int64).reshape(-1, len(COLUMNS))


def joined(known: list[Trainable], parts: Iterable[tuple[list[Trainable], list[dict[str, str]], Column]]) -> Table:
    """One table of what several ranks hold, in their order.

    Args:
        known: parameters that all ranks know
        parts: of each rank more parameters, kinds, and rows (n, 7) that refer to these, parameters counted from
            `known` on; what they say of files is ignored

    Raises:
        CheckpointError: two ranks disagree about the shape or the role of a parameter, or one has no element
    """
    parameters: dict[str, tuple[int, Trainable]] = {}
    of_known = [_place_of(of, parameters) for of in known]
    kinds: list[dict[str, str]] = []
    found = [np.empty((0, len(COLUMNS)), dtype=np.int64)]
    for file, (more, own_kinds, rows) in enumerate(parts):
        places = np.array(of_known + [_place_of(of, parameters) for of in more], dtype=np.int64)
        kinds += [kind for kind in own_kinds if kind not in kinds]
        of_kind = np.array([kinds.index(kind) for kind in own_kinds], dtype=np.int64)
        part = Table(known, own_kinds, rows)
        columns = {"parameter": places[part.column("parameter")], "kind": of_kind[part.column("kind")]}
        found.append(part.with_columns(file=np.full(len(rows), file), **columns).rows)
    return Table([of for _, of in parameters.values()], kinds, np.concatenate(found))


def rows_of(layouts: list[ShardLayout], places: dict[Trainable, int], kinds: list[dict[str, str]]) -> list[list[int]]:
    """A rank's shards as rows of a `Table`, its file being number 0.

    Args:
        layouts: its shards
        places: of their parameters
        kinds: every set of dtypes among the shards
    """
    return [
        [0, shard, places[one.of], one.start, one.stop, one.offset, kinds.index(layout.dtypes)]
        for shard, layout in enumerate(layouts)
        for one in layout.segments
    ]


def without_duplicates(table: Table) -> Table:
    """Leave every element to the lowest rank that holds it, so that replicas are written once.

    Returns:
        What remains of the segments; offsets are still those in the shards that were given. The table itself, where
        that is all of it.
    """
    start, stop = table.spans
    if not _overlap(start, stop):
        return table
    # of segments that are equal the first is all that is needed, whatever else overlaps
    _, first = np.unique(np.stack([start, stop], axis=1), axis=0, return_index=True)
    table = table.only(np.sort(first))
    start, stop = table.spans
    if not _overlap(start, stop):
        return table
    taken = Ranges()
    kept = []
    for row, low, high in zip(table.rows, start.tolist(), stop.tolist(), strict=True):
        for gap_start, gap_stop in taken.gaps(low, high):
            piece = row.copy()
            piece[COLUMNS.index("start")] += gap_start - low
            piece[COLUMNS.index("stop")] -= high - gap_stop
            piece[COLUMNS.index("offset")] += gap_start - low
            kept.append(piece)
        taken.add(low, high)
    return replace(table, rows=np.array(kept, dtype=np.int64))


def packed(table: Table) -> Table:
    """The same segments behind one another from offset 0 of their shards: how they lie in a file, without padding."""
    lengths = table.column("stop") - table.column("start")
    before = np.cumsum(lengths) - lengths
    shards = table.rows[:, [COLUMNS.index("file"), COLUMNS.index("shard")]]
    begins = np.ones(len(shards), dtype=bool)
    begins[1:] = (shards[1:] != shards[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(shards)), 0))
    return table.with_columns(offset=before - before[first])


def first_gap(table: Table) -> tuple[Trainable, int, int] | None:
    """A parameter and a range of its elements that no segment holds; None where every parameter is whole."""
    start, stop = table.spans
    order = np.argsort(start, kind="stable")
    bases = table.bases
    begins = np.append(start[order], bases[-1])
    held_until = np.maximum.accumulate(np.concatenate([[0], stop[order]]))
    gaps = np.flatnonzero(begins > held_until)
    if not len(gaps):
        return None
    low, high = int(held_until[gaps[0]]), int(begins[gaps[0]])
    place = bisect_right(bases.tolist(), low) - 1
    base = int(bases[place])
    return table.parameters[place], low - base, min(high, int(bases[place + 1])) - base


def _overlap(start: Column, stop: Column) -> bool:
    order = np.argsort(start, kind="stable")
    return bool((start[order][1:] < np.maximum.accumulate(stop[order])[:-1]).any())


def _place_of(of: Trainable, parameters: dict[str, tuple[int, Trainable]]) -> int:
    place, known = parameters.setdefault(of.name, (len(parameters), of))
    if known != of:
        raise CheckpointError(f"Parameter {known.name} is described in two ways: {known} and {of}.")
    if 0 in of.shape:
        raise CheckpointError(f"Parameter {of.name} is empty: its shape is {of.shape}.")
    return place
