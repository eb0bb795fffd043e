"""A learning rate for an arm: successive halving over a grid of factors of 2 (Jamieson & Talwalkar 2016, 1502.07943).

All rates of the grid take the first steps, the better half of them goes on. The last ones take all steps, and so do the
neighbours of the best of these, whether halving has dropped them or the grid never had them, until the best has both:
a loss that jumps where it is looked at early, or falls late, costs a rate steps but not the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

FACTOR = 2.0
_MOST_ROUNDS = 7

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
    alive = sorted(grid)
    *short, whole = budgets(num_steps)
    for steps in short:
        alive = survivors(losses_at(alive, steps))
    losses: dict[float, float] = {}
    for _ in range(_MOST_ROUNDS):
        losses |= losses_at(alive, whole)
        best = min(losses, key=lambda rate: (losses[rate], rate))
        alive = sorted({best / FACTOR, best * FACTOR} - losses.keys())
        if not alive:
            break
    return best
