"""`benchmarks/study`: the arithmetic of its comparisons, and the search for rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from benchmarks.study.halving import budgets, choose_rate, survivors
from benchmarks.study.paired import difference, halves, interval, mean_loss, steps_to_reach


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_a_difference_that_is_the_same_for_every_token_has_no_width() -> None:
    tokens_N = np.arange(1, 31)
    control_SN = 10 + drawn(3, 30)
    nll_SN = control_SN + 0.25 * tokens_N
    assert difference(nll_SN, control_SN, tokens_N) == pytest.approx(0.25)
    assert interval(nll_SN, control_SN, tokens_N) == pytest.approx((0.25, 0.25))


def test_losses_are_means_over_targets_not_over_rows() -> None:
    nll_SN, tokens_N = np.array([[1.0, 8.0], [2.0, 6.0]]), np.array([1, 3])
    np.testing.assert_allclose(mean_loss(nll_SN, tokens_N), [9 / 4, 8 / 4])
    assert difference(nll_SN, np.zeros_like(nll_SN), tokens_N) == pytest.approx((9 / 4 + 8 / 4) / 2)


def test_the_interval_of_one_seed_is_that_of_the_mean_over_rows() -> None:
    """Of 400 normal differences: mean and 1.96 standard errors; and 1.645 of them for 90 %."""
    differences_N = 0.05 + drawn(400)
    ones_N, control_SN = np.ones(400), np.zeros((1, 400))
    error = differences_N.std() / 20
    for level, width in ((0.95, 1.96), (0.9, 1.645)):
        low, high = interval(differences_N[None], control_SN, ones_N, level=level)
        assert low == pytest.approx(differences_N.mean() - width * error, abs=0.12 * width * error)
        assert high == pytest.approx(differences_N.mean() + width * error, abs=0.12 * width * error)


def test_seeds_are_drawn_as_blocks() -> None:
    """Where seeds differ and rows do not, the interval is that of a mean of three drawn seeds."""
    of_seeds = np.array([0.0, 0.3, 0.6])
    nll_SN = np.repeat(of_seeds[:, None], 500, axis=1)
    low, high = interval(nll_SN, np.zeros_like(nll_SN), np.ones(500))
    means = [np.mean(of_seeds[list(drawn)]) for drawn in np.ndindex(3, 3, 3)]  # all 27 equally likely draws
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.11)
    assert high - low > 0.3


def test_pairs_show_what_means_alone_do_not() -> None:
    """Rows differ by far more than arms do; what an arm adds to each row is seen all the same."""
    control_SN = 20 * np.abs(drawn(1, 200))
    nll_SN = control_SN - 0.1 + 0.2 * drawn(1, 200, seed=1)
    tokens_N = np.ones(200)
    _, high = interval(nll_SN, control_SN, tokens_N)
    assert high < 0
    apart = 1.96 * math.hypot(nll_SN.std(), control_SN.std()) / math.sqrt(200)
    assert apart > 10 * abs(difference(nll_SN, control_SN, tokens_N)), "two separate means would tell nothing"


@pytest.mark.parametrize("num_rows", [2, 7, 256])
def test_halves_are_apart_and_the_same_every_time(num_rows: int) -> None:
    choosing, reporting = halves(num_rows)
    assert sorted([*choosing, *reporting]) == list(range(num_rows))
    assert abs(len(choosing) - len(reporting)) <= 1
    assert all((one == other).all() for one, other in zip(halves(num_rows), (choosing, reporting), strict=True))


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(10, 2.0), (20, 1.0)], 1.5, 15.0),
        ([(10, 2.0), (20, 1.0)], 1.0, 20.0),
        ([(10, 2.0), (20, 1.0), (30, 3.0)], 2.0, 10.0),
        ([(10, 2.0), (20, 1.0)], 0.9, None),
    ],
)
def test_steps_to_a_loss_lie_on_the_line_between_evaluations(
    curve: list[tuple[int, float]], target: float, expected: float | None
) -> None:
    assert steps_to_reach(curve, target) == expected


# The search for a rate


def test_the_better_half_goes_on() -> None:
    assert survivors({1.0: 3.0, 2.0: 1.0, 4.0: 2.0, 8.0: math.inf, 16.0: math.inf}) == [1.0, 2.0, 4.0]
    assert survivors({1.0: 1.0, 2.0: 2.0}) == [1.0]
    assert survivors({1.0: math.inf, 2.0: math.inf}) == [1.0]
    assert budgets(60) == [15, 30, 60] and budgets(1) == [1]


class Bowl:
    """Losses that are least at a rate, but after `jumps_at` steps; remembers what was trained."""

    def __init__(self, best: float, jumps_at: int | None = None) -> None:
        self.best, self.jumps_at, self.trained = best, jumps_at, []

    def losses_at(self, rates: Sequence[float], steps: int) -> Mapping[float, float]:
        self.trained += [(rate, steps) for rate in rates]
        jump = {self.best: 100.0} if steps == self.jumps_at else {}
        return {rate: math.log2(rate / self.best) ** 2 + 1 / steps + jump.get(rate, 0.0) for rate in rates}


@pytest.mark.parametrize(
    ("best", "whole"),
    [
        (4.0, [4.0, 2.0, 8.0]),
        (8.0, [8.0, 4.0, 16.0]),
        (32.0, [8.0, 4.0, 16.0, 32.0, 64.0]),
        (1.0, [1.0, 0.5, 2.0]),
        (0.25, [1.0, 0.5, 2.0, 0.25, 0.125]),
    ],
)
def test_the_rate_is_found_even_outside_of_the_grid(best: float, whole: list[float]) -> None:
    """With every rate of the grid in the first quarter and few in all of it, among these the neighbours of the best."""
    bowl = Bowl(best)
    assert choose_rate([1.0, 2.0, 4.0, 8.0], 40, bowl.losses_at) == best
    assert all((rate, 10) in bowl.trained for rate in (1.0, 2.0, 4.0, 8.0))
    assert sum(steps == 20 for _, steps in bowl.trained) == 2
    assert [rate for rate, steps in bowl.trained if steps == 40] == whole


@pytest.mark.parametrize("jumps_at", [10, 20])
def test_a_rate_whose_loss_jumps_when_rates_are_compared_still_comes_to_its_end(jumps_at: int) -> None:
    bowl = Bowl(2.0, jumps_at)
    assert choose_rate([1.0, 2.0, 4.0, 8.0], 40, bowl.losses_at) == 2.0
    assert ((2.0, 20) in bowl.trained) == (jumps_at == 20), "dropped where it jumped"
