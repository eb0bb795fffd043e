from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dsmoelora.data.mixing import Mixture

SIZES = [5, 11, 7]  # samples 0-4, 5-15, 16-22
SETS = np.repeat([0, 1, 2], SIZES)


def test_without_weights_every_sample_comes_once_an_epoch() -> None:
    mixture = Mixture(SIZES)
    for epoch in range(3):
        assert sorted(mixture.epoch(0, epoch)) == list(range(23))


@pytest.mark.parametrize("weights", [[1, 1, 1], [3.0, 1.0, 0.5], [1, 100, 1]])
def test_shares_are_those_of_the_weights(weights: list[float]) -> None:
    mixture = Mixture(SIZES, weights)
    exact = 23 * np.array(weights) / sum(weights)
    for epoch in range(4):
        counts = np.bincount(SETS[mixture.epoch(0, epoch)], minlength=3)
        assert counts.sum() == 23 and np.abs(counts - exact).max() < 1
        assert counts.tolist() == mixture.quotas


def test_no_sample_comes_again_before_all_others_of_its_set() -> None:
    # 23 places an epoch at weights 12 : 6 : 5 draw 12 from five samples, 6 from eleven and 5 from seven.
    mixture = Mixture(SIZES, [12, 6, 5])
    seen: Counter[int] = Counter()
    for epoch in range(9):
        seen.update(mixture.epoch(3, epoch).tolist())
        for first, size in ((0, 5), (5, 11), (16, 7)):
            counts = [seen[sample] for sample in range(first, first + size)]
            assert max(counts) - min(counts) <= 1


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    one, other = Mixture(SIZES, [2, 1, 1]), Mixture(SIZES, [2, 1, 1])
    later = one.epoch(7, 10**6).tolist()
    one.epoch(7, 0)
    assert other.epoch(7, 10**6).tolist() == later
    assert one.epoch(7, 10**6 + 1).tolist() != later != one.epoch(8, 10**6).tolist()


def test_sets_are_spread_over_the_epoch() -> None:
    mixture = Mixture([1000, 1000], [3, 1])
    halves = np.split(mixture.epoch(0, 0) >= 1000, 2)
    # 500 of 2,000 places are of the second set; half of them in each half, give or take six standard deviations.
    assert all(abs(int(half.sum()) - 250) < 6 * np.sqrt(2000 * 0.25 * 0.75) / 2 for half in halves)


def test_one_set_with_a_weight_is_all_there_is() -> None:
    assert sorted(Mixture([5], [0.3]).epoch(0, 2)) == [0, 1, 2, 3, 4]
