"""The arithmetic of a comparison: arms are compared row by row, on rows that did not choose their rates.

Shapes: `S` seeds, `N` held-out rows. `nll_SN` are sums of negative log likelihoods over the targets of a row,
`tokens_N` how many these are; losses are means over targets, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REPLICATES = 4_000


def halves(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the rows, as index arrays: on one rates are chosen, on the other arms are compared."""
    order = np.random.default_rng(seed).permutation(num_rows)
    return np.sort(order[: num_rows // 2]), np.sort(order[num_rows // 2 :])


def mean_loss(nll_SN: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """(S,): the loss of each seed."""
    return nll_SN.sum(-1) / tokens_N.sum()


def difference(nll_SN: np.ndarray, control_SN: np.ndarray, tokens_N: np.ndarray) -> float:
    """How far the loss lies above the control's, the mean over seeds; below 0 is better."""
    return float((mean_loss(nll_SN, tokens_N) - mean_loss(control_SN, tokens_N)).mean())


def interval(
    nll_SN: np.ndarray, control_SN: np.ndarray, tokens_N: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """A bootstrap interval of `difference`.

    Both arms have the same rows, the same order of samples and the same draws for a seed, so what is drawn anew are
    pairs: seeds as whole blocks, and rows, the same for all seeds of a replicate (Efron & Tibshirani 1993, chapter 13).

    Args:
        nll_SN, control_SN: of the same seeds and rows
        tokens_N: of the rows
        level: share of the replicates inside
        seed: of the replicates
    """
    rng = np.random.default_rng(seed)
    differences_SN = nll_SN - control_SN
    num_seeds, num_rows = differences_SN.shape
    seeds_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), REPLICATES)
    rows_BN = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), REPLICATES)
    sums_B = np.einsum("bs,sn,bn->b", seeds_BS, differences_SN, rows_BN, optimize=True) / num_seeds
    low, high = np.quantile(sums_B / (rows_BN @ tokens_N), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def steps_to_reach(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The first step at which a curve of (step, loss) is at the target, on the line between two evaluations."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None
