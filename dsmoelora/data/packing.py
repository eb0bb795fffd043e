"""Which samples share a row of `max_length` tokens, so that little of what is computed is padding.

Best-fit decreasing (Johnson 1974, *Fast algorithms for bin packing*): from the longest sample to the shortest, each
goes into the row with the least room that it fits into. Lengths are small whole numbers, so all samples of a length and
all rows of the same content are placed at once (as histograms are packed in Krell et al. 2021, arXiv 2107.02027): a
million samples take a fraction of a second.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoelora.data.cache import cache_file
from dsmoelora.data.mixing import Mixture
from dsmoelora.errors import DataError
from dsmoelora.seeds import derive_seed

PLAN_VERSION = 1  # raise it when the same samples would be packed in another way


@dataclass(frozen=True, eq=False)
class Packing:
    """Rows of samples; every sample is in one of them.

    Args:
        samples: (num_samples,) numbers of the samples, row after row
        starts: (num_rows + 1,) where each row begins in `samples`, and the end
        capacity: tokens that a row can hold
        mixture: which rows make up an epoch
    """

    samples: np.ndarray
    starts: np.ndarray
    capacity: int
    mixture: Mixture

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The samples of one row, in their order."""
        return self.samples[self.starts[index] : self.starts[index + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(num_rows,) sums over each row of a (num_samples,) count, e.g. of tokens."""
        return np.add.reduceat(values[self.samples], self.starts[:-1])


def load_packing(num_tokens: np.ndarray, mixture: Mixture, fingerprint: str, seed: int, max_length: int) -> Packing:
    """Pack the samples of a dataset, or take the plan of an earlier time from the cache (on every rank at once).

    Args:
        num_tokens: (num_samples,) tokens of each sample
        mixture: which samples make up an epoch
        fingerprint: of the dataset
        seed: decides which of the samples of equal length share a row
        max_length: tokens of a row

    Raises:
        DataError: the cache folder cannot be written, or a set has too little weight for a row
    """
    # The lengths take part: another version of a tokenizer's library may change them under the same fingerprint.
    digest = hashlib.sha256(np.ascontiguousarray(num_tokens, dtype=np.int64).tobytes()).hexdigest()
    with cache_file(["packing", PLAN_VERSION, fingerprint, digest, seed, max_length], ".npz") as file:
        if not file.exists():
            _write(pack_sets(num_tokens, mixture, max_length, seed), file)
        with np.load(file) as arrays:
            rows = _mixture_of_rows(mixture, arrays["sizes"].tolist())
            return Packing(arrays["samples"], arrays["starts"], max_length, rows)


def _write(packing: Packing, file: Path) -> None:
    """Under another name first: a process that is killed here leaves nothing half-done."""
    partial = file.with_suffix(".part")
    with partial.open("wb") as stream:
        np.savez(stream, samples=packing.samples, starts=packing.starts, sizes=np.array(packing.mixture.sizes))
    partial.replace(file)


def pack_sets(num_tokens: np.ndarray, mixture: Mixture, capacity: int, seed: int) -> Packing:
    """Pack joined sets together, and sets with weights each for itself, so that rows can be mixed as samples would.

    Args:
        num_tokens: (num_samples,) tokens of each sample
        mixture: which samples make up an epoch
        capacity, seed: as in `pack`

    Raises:
        DataError: a set has too little weight for a row
    """
    sizes = mixture.sizes if _is_weighted(mixture) else [len(num_tokens)]
    firsts = np.cumsum([0, *sizes])
    parts = [pack(num_tokens[first : first + size], capacity, seed) for first, size in zip(firsts, sizes, strict=False)]
    samples = np.concatenate([first + part.samples for first, part in zip(firsts, parts, strict=False)])
    counts = np.concatenate([np.diff(part.starts) for part in parts])
    rows = _mixture_of_rows(mixture, [len(part) for part in parts])
    return Packing(samples, np.cumsum([0, *counts]), capacity, rows)


def _is_weighted(mixture: Mixture) -> bool:
    return list(mixture.quotas) != list(mixture.sizes)


def _mixture_of_rows(mixture: Mixture, sizes: list[int]) -> Mixture:
    """Rows of each set in a proportion that gives each as many samples as `mixture` does."""
    if not _is_weighted(mixture):
        return Mixture(sizes)
    per_set = zip(mixture.quotas, mixture.sizes, sizes, strict=True)
    rows = Mixture(sizes, [quota * num_rows / size for quota, size, num_rows in per_set])
    for place, quota in enumerate(rows.quotas):
        if not quota:
            raise DataError(
                f"data.train[{place}].weight is too small for one of the {rows.num_places} rows of an epoch. "
                "Raise it, set data.packing to false, or take the set out."
            )
    return rows


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packing:
    """Put samples into rows, deterministically.

    Args:
        lengths: (num_samples,) tokens of each sample, from 1 to `capacity`
        capacity: tokens of a row
        seed: decides which of the samples of equal length share a row
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) and lengths.min() >= 1 and lengths.max() <= capacity, "lengths must lie in [1, capacity]"
    counts = np.bincount(lengths, minlength=capacity + 1)
    order = np.random.default_rng(derive_seed("packing", seed)).permutation(len(lengths))
    queue = order[np.argsort(lengths[order], kind="stable")]  # shuffled among samples of equal length
    taken = np.concatenate([[0], np.cumsum(counts)[:-1]])  # where the samples of each length go on in the queue
    blocks, widths = [], []
    for kind in _best_fit(counts, capacity):
        columns = []
        for length, times in kind.parts:
            end = taken[length] + kind.num_rows * times
            columns.append(queue[taken[length] : end].reshape(kind.num_rows, times))
            taken[length] = end
        block = np.concatenate(columns, axis=1)
        blocks.append(block.ravel())
        widths.append(np.full(len(block), block.shape[1]))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(widths))])
    return Packing(np.concatenate(blocks), starts, capacity, Mixture([len(starts) - 1]))


@dataclass(frozen=True)
class _Kind:
    """Rows of the same content.

    Args:
        num_rows: how many there are
        room: tokens that still fit into each
        parts: (length, times): each holds that many samples of that length
    """

    num_rows: int
    room: int
    parts: tuple[tuple[int, int], ...] = ()

    def filled(self, num_rows: int, length: int, times: int) -> _Kind:
        """`num_rows` of them after `times` more samples of `length`."""
        return _Kind(num_rows, self.room - length * times, (*self.parts, (length, times)))


class _OpenRows:
    """Kinds of rows, found by the room they have."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[_Kind]] = {}
        self._rooms: list[int] = []

    def add(self, kind: _Kind) -> None:
        if kind.room not in self._by_room:
            insort(self._rooms, kind.room)
        self._by_room.setdefault(kind.room, []).append(kind)

    def take_tightest(self, length: int) -> _Kind | None:
        """The rows with the least room that `length` fits into, taken out; None where it fits into none."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms[place]
        kind = self._by_room[room].pop()
        if not self._by_room[room]:
            del self._by_room[room], self._rooms[place]
        return kind

    def all(self) -> list[_Kind]:
        return [kind for room in self._rooms for kind in self._by_room[room]]


def _best_fit(counts: np.ndarray, capacity: int) -> list[_Kind]:
    """Best-fit decreasing on the histogram of lengths; `counts[l]` samples have length l.

    A row that has taken a sample and has room for another of that length is still the tightest one: so rows of a kind
    are filled one after the other with as many as fit.
    """
    rows = _OpenRows()
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            per_new_row = capacity // length
            kind = rows.take_tightest(length) or _Kind(-(-left // per_new_row), capacity)
            times = kind.room // length
            full, rest = divmod(left, times)
            full, rest = (full, rest) if full < kind.num_rows else (kind.num_rows, 0)
            untouched = kind.num_rows - full - bool(rest)
            if full:
                rows.add(kind.filled(full, length, times))
            if rest:
                rows.add(kind.filled(1, length, rest))
            if untouched:
                rows.add(_Kind(untouched, kind.room, kind.parts))
            left -= full * times + rest
    return rows.all()
