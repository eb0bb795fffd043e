"""Rows of large sets, read piece by piece: one endless stream, the same on every rank, that goes on where it was left.

Every set is an `IterableDataset`, whose own state says how far it was read. A shuffle buffer of that library loses its
content with a resume, and some rows come twice and others never. So rows are shuffled here, in blocks: a block is read,
its order follows from the seed and its number, and the state is that of the library *before* the block and the place
inside it. To go on, the block is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow

from dsmoelora.data.readers import RowSource, table_rows
from dsmoelora.errors import DataError, UserError
from dsmoelora.seeds import derive_seed

State = dict[str, Any]  # JSON-able


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its set.

    Args:
        set_number: which set
        number: of the row in the set, from 1 (in JSON lines and CSV: the line)
        content: not checked yet
    """

    set_number: int
    number: int
    content: Any


class SetStream:
    """One set from its first row to its last.

    Args:
        source: opened for streaming

    Attributes:
        num_read: rows since the first
    """

    num_read: int
    _begun_at: State | None
    _rows: Iterator[Any]

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.rewind()

    def rewind(self) -> None:
        """Begin with the first row again."""
        self._begin({"num_read": 0, "library": None})

    def state(self) -> State:
        """Where it stands."""
        if self._begun_at is not None:  # the library knows its state after the first row only
            return self._begun_at
        return {"num_read": self.num_read, "library": self._dataset.state_dict()}

    def load_state(self, state: State) -> None:
        """Go on where it stood.

        Raises:
            DataError: it cannot be read, or no longer has as many rows
        """
        self._begin(state)

    def next(self) -> tuple[int, Any] | None:
        """Number and content of the next row; None at the end.

        Raises:
            DataError: the set cannot be read
        """
        try:
            row = next(self._rows, None)
        except UserError:
            raise
        except Exception as error:  # of a disk, a network or several libraries; whatever it is, the set is out of reach
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise DataError(
                f"{self.source.name} cannot be read on after {self.num_read:,} rows ({reason}). See to it that it can, "
                "then go on with --resume auto."
            ) from error
        if row is None:
            return None
        self._begun_at = None
        self.num_read += 1
        if self.source.dataset is None:
            return row["number"], row["content"]
        if isinstance(row, pyarrow.Table):
            (row,) = table_rows([row], self.source.columns)
        return self.num_read, row

    def _begin(self, state: State) -> None:
        self._begun_at, self.num_read = state, int(state["num_read"])
        self._dataset = _iterable(self.source)
        if state["library"] is not None:
            self._dataset.load_state_dict(state["library"])
        self._rows = iter(self._dataset)


def _iterable(source: RowSource) -> datasets.IterableDataset:
    """A new pass over a source; of a file each row has its `number` and `content`."""
    if source.dataset is None:
        return datasets.IterableDataset.from_generator(_numbered, gen_kwargs={"source": source})
    if isinstance(source.dataset, datasets.IterableDataset):
        return source.dataset.with_format(None)  # a copy, with a state of its own
    return source.dataset.to_iterable_dataset()


def _numbered(source: RowSource) -> Iterator[dict[str, Any]]:
    for number, content in source.read():
        yield {"number": number, "content": content}


class MixedStream:
    """Several sets as one stream of epochs.

    The next row is of the set that is furthest behind its share. Without weights the sets take turns, and one that has
    come to its end waits for the others: each row comes once an epoch. With weights it begins anew, and the epoch ends
    when every set has come to its end.

    Args:
        sets: in the recipe's order
        weights: one for each set; None joins the sets
    """

    def __init__(self, sets: Sequence[SetStream], weights: Sequence[float] | None) -> None:
        self._sets = sets
        self._weighted = weights is not None
        self._weights = [1.0] * len(sets) if weights is None else list(weights)
        self._num_taken = [0] * len(sets)
        self._ended = [False] * len(sets)

    def state(self) -> State:
        """Where it stands."""
        sets = [each.state() for each in self._sets]
        return {"num_taken": list(self._num_taken), "ended": list(self._ended), "sets": sets}

    def load_state(self, state: State) -> None:
        """Go on where it stood."""
        self._num_taken, self._ended = list(state["num_taken"]), list(state["ended"])
        for each, own in zip(self._sets, state["sets"], strict=True):
            each.load_state(own)

    def next(self) -> RawRow | None:
        """The next row; None where an epoch ends.

        Raises:
            DataError: a set cannot be read, or is empty
        """
        while not all(self._ended):
            number = self._furthest_behind()
            row = self._sets[number].next()
            if row is not None:
                self._num_taken[number] += 1
                return RawRow(number, *row)
            self._end(number)
        self._ended = [False] * len(self._sets)
        if not self._weighted:
            self._num_taken = [0] * len(self._sets)
        return None

    def _furthest_behind(self) -> int:
        takes_part = [number for number in range(len(self._sets)) if self._weighted or not self._ended[number]]
        return min(takes_part, key=lambda number: (self._num_taken[number] + 1) / self._weights[number])

    def _end(self, number: int) -> None:
        if not self._sets[number].num_read:
            raise DataError(f"{self._sets[number].source.name} holds no rows. Give a set with at least one.")
        self._ended[number] = True
        self._sets[number].rewind()


class ShuffledStream:
    """The rows of a mixed stream without end, in an order that follows from the seed alone.

    Args:
        mixed: epoch after epoch
        seed: decides the order inside blocks
        block_size: rows of a block, which are in memory at once; the last block of an epoch may be smaller

    Attributes:
        epoch: of the block that the last row came from, from 0
    """

    def __init__(self, mixed: MixedStream, seed: int, block_size: int) -> None:
        self._mixed, self._seed, self._block_size = mixed, seed, block_size
        self._begin = mixed.state()
        self._rewind()

    def _rewind(self) -> None:
        self._number, self.epoch, self._taken = -1, 0, 0
        self._rows: list[RawRow] = []
        self._epoch_ends = False

    def state(self) -> State:
        """Where it stands."""
        return {"block": self._number, "epoch": self.epoch, "taken": self._taken, "begin": self._begin}

    def load_state(self, state: State) -> None:
        """Go on where another one of the same sets stood, by reading its block again.

        Raises:
            DataError: a set cannot be read, or has changed
        """
        self._mixed.load_state(state["begin"])
        if state["block"] < 0:  # of before the first row
            self._begin = state["begin"]
            self._rewind()
            return
        self._number, self.epoch, self._epoch_ends = state["block"] - 1, state["epoch"], False
        self._read_block()
        if len(self._rows) < state["taken"]:
            raise DataError("data.train has fewer rows than when the checkpoint was saved. Give the same sets again.")
        self._taken = state["taken"]

    def next(self) -> RawRow:
        """The next row.

        Raises:
            DataError: a set cannot be read, or is empty
        """
        while self._taken == len(self._rows):
            self._read_block()
        self._taken += 1
        return self._rows[self._taken - 1]

    def _read_block(self) -> None:
        self.epoch += self._epoch_ends
        self._number += 1
        self._begin = self._mixed.state()
        rows: list[RawRow] = []
        row: RawRow | None = None
        while len(rows) < self._block_size and (row := self._mixed.next()) is not None:
            rows.append(row)
        self._epoch_ends = row is None
        order = np.random.default_rng(derive_seed("block", self._seed, self._number)).permutation(len(rows))
        self._rows, self._taken = [rows[place] for place in order], 0
