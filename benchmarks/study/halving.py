"""A learning rate for an arm: successive halving over a grid of factors of 2 (Jamieson & Talwalkar 2016, 1502.07943).

All rates of the grid take the first steps, the better half of them goes on. The last ones take all steps, and where the
best of these lies at the edge of what was tried, the grid grows by one rate, until it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

FACTOR = 2.0
_MOST_GROWTH = 6

# The held-out losses of these rates after so many steps; infinity for one that diverged.
LossesAt = Callable[[Sequence[float], int], Mapping[float, float]]


def survivors(losses: Mapping[float, float]) -> list[float]:
    """The better half of the rates, rounded up; without those that diverged, unless all did. Ties: the lower rates."""
    ranked = sorted(losses, key=lambda rate: (losses[rate], rate))
    kept = ranked[: math.ceil(len(ranked) / 2)]
    return sorted([rate for rate in kept if math.isfinite(losses[rate])] or ranked[:1])


def budgets(num_steps: int) -> list[int]:
    """After how many steps rates are compared."""
    return sorted({max(1, num_steps // 4), max(1, num_steps // 2), num_steps})


def choose_rate(grid: Sequence[float], num_steps: int, losses_at: LossesAt) -> float:
    """The best rate after all steps.

    Args:
        grid: rates to begin with
        num_steps: of a whole run
        losses_at: trains what is missing and gives the losses
    """
    alive, tried = sorted(grid), set(grid)
    *short, whole = budgets(num_steps)
    for steps in short:
        alive = survivors(losses_at(alive, steps))
    losses = dict(losses_at(alive, whole))
    for _ in range(_MOST_GROWTH):
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best not in (min(tried), max(tried)):
            break
        further = best / FACTOR if best == min(tried) else best * FACTOR
        tried.add(further)
        losses |= losses_at([further], whole)
    return min(losses, key=lambda rate: (losses[rate], rate))
