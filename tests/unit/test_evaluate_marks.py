"""What counts as right, against examples by hand and the equations that the intervals solve."""

from __future__ import annotations

import random
import statistics
from decimal import Decimal

import pytest

from dsmoelora.evaluate.marks import last_number, mean_of_tokens, normalised, wanted_number, wilson

Z = statistics.NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("It costs $1,234.50 in all", "1234.50"),
        ("7 of 1,000,000", "1000000"),
        ("1,2,3", "3"),  # a list: these commas part no thousands
        ("12,34", "34"),
        ("5 - 3 = 2", "2"),
        ("pages 3-4", "4"),  # not minus four
        ("x = -5", "-5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("−3 degrees", "-3"),  # the sign of typesetters
        (".5 kg", "0.5"),
        ("18.00", "18"),
        ("#### 70,000", "70000"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "number"),
    [("3 + 4 = 7\n#### 7", 7), ("He has 5 left", 5), ("#### 1\n#### 2", 2), ("No.", None), ("12 apples\n####", None)],
)
def test_what_a_reference_comes_to(answer: str, number: int | None) -> None:
    assert wanted_number(answer) == number


def test_capitals_white_space_and_forms_of_unicode_do_not_count() -> None:
    assert normalised(" Grand\n  CAFÉ ") == normalised("grand cafe\u0301") == normalised("Grand Ｃafé")
    assert normalised("a b") != normalised("ab") and normalised("a.") != normalised("a")


@pytest.mark.parametrize(("num_right", "count"), [(0, 1), (0, 30), (1, 3), (57, 100), (30, 30), (1, 100_000)])
def test_the_bounds_are_the_shares_at_which_what_was_seen_is_just_possible(num_right: int, count: int) -> None:
    interval = wilson(num_right, count)
    assert interval.value == num_right / count
    for bound in (interval.low, interval.high):
        distance = abs(interval.value - bound)
        assert distance**2 == pytest.approx(Z**2 * bound * (1 - bound) / count, abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.high - interval.low > 0


def test_a_mean_of_tokens_has_the_spread_of_means_over_drawn_rows() -> None:
    rng = random.Random(0)
    counts = [rng.randint(1, 20) for _ in range(300)]
    sums = [sum(rng.expovariate(0.5) for _ in range(count)) + rng.gauss(0, 2) for count in counts]
    interval = mean_of_tokens(sums, counts)
    assert interval.value == pytest.approx(sum(sums) / sum(counts))
    means = []
    for _ in range(2000):  # the bootstrap
        drawn = rng.choices(range(300), k=300)
        means.append(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn))
    assert (interval.high - interval.low) / 2 == pytest.approx(Z * statistics.stdev(means), rel=0.08)
    assert interval.high - interval.value == pytest.approx(interval.value - interval.low)
