"""What counts as right, and how sure a share of right answers is: plain functions of texts and numbers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
_ANSWER_MARK = "####"  # before the final number of an answer, as in GSM8K
# A minus belongs to the number unless something stands right before it (`3-4`); commas only where they part thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−]\$?|\$[-−]?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)",
)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def normalised(text: str) -> str:
    """A text without differences that do not count: Unicode's compatibility forms, capitals, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators and `$` left out; None where there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[-1]).replace("−", "-"))


def wanted_number(answer: str) -> Decimal | None:
    """The number that a reference answer comes to: what follows its last `####`, without such a mark its last one."""
    return last_number(answer.rpartition(_ANSWER_MARK)[2])


def wilson(num_right: int, count: int) -> Interval:
    """The share of right answers with the score interval of Wilson (1927), which stays within 0 and 1.

    Args:
        num_right: of `count`
        count: 1 or more
    """
    share, square = num_right / count, _Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, min(low, share), max(high, share))  # up to rounding, the share lies between them


def mean_of_tokens(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """The mean over all tokens of rows, with the normal interval of a ratio of two sums (rows are independent).

    Args:
        sums: of each row, over its tokens
        counts: tokens of each row
    """
    total = sum(counts)
    mean = math.fsum(sums) / total
    spread = math.sqrt(math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True)))
    half = _Z95 * spread / total
    return Interval(mean, mean - half, mean + half)
