"""The plan of packing: no sample lost or twice, no row too full, the rows of best-fit decreasing, kept on disk."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from dsmoelora.data import packing as packing_module
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.packing import Packing, load_packing, pack, pack_sets
from dsmoelora.errors import DataError


def lengths_of(case: int) -> tuple[np.ndarray, int]:
    """Random lengths of one of several shapes, and a capacity."""
    rng = np.random.default_rng(case)
    capacity = int(rng.integers(1, 80))
    count = int(rng.integers(1, 400))
    shapes = [
        rng.integers(1, capacity + 1, count),
        1 + rng.binomial(capacity - 1, 0.3, count),
        np.full(count, rng.integers(1, capacity + 1)),
        np.minimum(capacity, 1 + rng.geometric(0.2, count)),
    ]
    return shapes[case % len(shapes)], capacity


def rooms_of_plain_best_fit(lengths: np.ndarray, capacity: int) -> list[int]:
    """What is left of each row after best-fit decreasing, one sample at a time; sorted."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("case", range(60))
def test_rows_are_those_of_best_fit_decreasing(case: int) -> None:
    lengths, capacity = lengths_of(case)
    packing = pack(lengths, capacity, seed=case)
    assert sorted(packing.samples.tolist()) == list(range(len(lengths))), "a sample is lost, or there twice"
    by_hand = [lengths[packing.row(i)].sum() for i in range(len(packing))]
    assert max(by_hand) <= capacity
    assert packing.sums(lengths).tolist() == by_hand
    assert sum(len(packing.row(i)) for i in range(len(packing))) == len(lengths)
    assert sorted(capacity - packing.sums(lengths)) == rooms_of_plain_best_fit(lengths, capacity)


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing.row(i).tolist() for i in range(len(packing))]


def test_the_seed_alone_decides_who_shares_a_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 300)
    assert rows_of(pack(lengths, 64, 5)) == rows_of(pack(lengths, 64, 5))
    assert rows_of(pack(lengths, 64, 5)) != rows_of(pack(lengths, 64, 6))
    assert len(pack(lengths, 64, -1)) == len(pack(lengths, 64, 2**70))  # any whole number is a seed


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_lengths_out_of_bounds_are_refused(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="lengths must lie in"):
        pack(np.array(lengths), 10, 0)


def test_samples_of_full_length_get_rows_of_their_own() -> None:
    assert sorted(rows_of(pack(np.array([10, 10, 10]), 10, 0))) == [[0], [1], [2]]


def test_a_million_samples_are_packed_in_seconds_and_densely() -> None:
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5, 1, 1_000_000)).astype(int), 1, 2048)
    begin = time.perf_counter()
    packing = pack(lengths, 2048, 0)
    assert time.perf_counter() - begin < 20
    assert lengths.sum() / (2048 * len(packing)) > 0.999
    assert np.array_equal(np.sort(packing.samples), np.arange(len(lengths)))


def test_sets_without_weights_share_rows() -> None:
    lengths = np.array([6, 6, 6, 4, 4, 4])
    packing = pack_sets(lengths, Mixture([3, 3]), 10, 0)
    assert packing.sums(lengths).tolist() == [10, 10, 10]
    assert packing.mixture.quotas == [3]


def test_sets_with_weights_keep_apart_and_give_as_many_samples_as_without_packing() -> None:
    """Set 0 has two samples a row, set 1 one: for 3 times as many samples of it, its rows come 6 times as often."""
    lengths = np.array([5] * 400 + [10] * 400)
    packing = pack_sets(lengths, Mixture([400, 400], [1.0, 3.0]), 10, 0)
    assert list(packing.mixture.sizes) == [200, 400] and len(packing) == 600
    samples = np.array([len(packing.row(i)) for i in range(len(packing))])
    assert (samples[:200] == 2).all() and (samples[200:] == 1).all()
    assert all((packing.row(i) < 400).all() for i in range(200))
    assert sorted(packing.samples.tolist()) == list(range(800))
    drawn = packing.mixture.epoch(0, 0)
    of_first, of_second = (int(samples[drawn[part]].sum()) for part in (drawn < 200, drawn >= 200))
    assert of_second / of_first == pytest.approx(3, rel=0.01)


def test_a_set_that_would_get_no_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.train\[1\].weight is too small"):
        pack_sets(np.ones(200, dtype=int), Mixture([100, 100], [99.0, 1.0]), 100, 0)


def test_the_plan_is_made_once_for_the_same_data_seed_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    made: list[int] = []

    def counted(lengths: np.ndarray, capacity: int, seed: int) -> Packing:
        made.append(capacity)
        return pack(lengths, capacity, seed)

    monkeypatch.setattr(packing_module, "pack", counted)
    lengths = np.random.default_rng(1).integers(1, 20, 100)
    sets = Mixture([60, 40])
    first = load_packing(lengths, sets, "data", 0, 64)
    again = load_packing(lengths, sets, "data", 0, 64)
    assert rows_of(first) == rows_of(again) == rows_of(pack(lengths, 64, 0))
    assert first.capacity == again.capacity == 64 and first.mixture.quotas == again.mixture.quotas == [len(first)]
    assert made == [64]
    load_packing(lengths, sets, "other data", 0, 64)
    load_packing(lengths, sets, "data", 1, 64)
    load_packing(lengths, sets, "data", 0, 65)
    load_packing(np.append(lengths[1:], lengths[:1]), sets, "data", 0, 64)
    assert made == [64, 64, 64, 65, 64]
    assert not list(tmp_path.rglob("*.part"))
