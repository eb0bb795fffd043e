"""Which samples make up an epoch when several sets are mixed, from the seed and the epoch's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class Mixture:
    """Sets of samples that lie one after the other in a dataset, and how often each is drawn from.

    An epoch has as many places as the sets hold samples together. Without weights each sample has one of them. With
    weights set i has the share `weight_i / sum of weights` of them (in whole places) and deals its samples out in
    permutations of its own, one after the other: none comes a second time before all others of its set came once.

    Args:
        sizes: samples of each set
        weights: one for each set, above 0; None joins the sets

    Attributes:
        sizes: as given
        num_places: samples of an epoch
        quotas: places of each set in an epoch
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        self.sizes = sizes
        self.num_places = sum(sizes)
        self.quotas = list(sizes) if weights is None else _quotas(self.num_places, weights)
        self._weighted = weights is not None

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """(num_places,) sample indices of one epoch, in order."""
        order = _permutation(self.num_places, seed, epoch)
        if not self._weighted:
            return order
        firsts = accumulate(self.sizes, initial=0)
        parts = [
            first + _stretch(size, seed, number, epoch * quota, quota)
            for number, (first, size, quota) in enumerate(zip(firsts, self.sizes, self.quotas, strict=False))
        ]
        return np.concatenate(parts)[order]


def _stretch(size: int, seed: int, number: int, begin: int, count: int) -> np.ndarray:
    """(count,) samples at the places [begin, begin + count) of the endless stream of one set's permutations."""
    rounds = range(begin // size, -(-(begin + count) // size))
    stream = [_permutation(size, seed, turn, number) for turn in rounds]
    skip = begin - rounds.start * size
    return np.concatenate([np.empty(0, dtype=np.int64), *stream])[skip : skip + count]


def _permutation(size: int, seed: int, *number: int) -> np.ndarray:
    return np.random.default_rng([seed % 2**64, *number]).permutation(size)


def _quotas(num_places: int, weights: Sequence[float]) -> list[int]:
    """Whole places in proportion to the weights, by largest remainders (of equal ones the first)."""
    exact = [num_places * weight / sum(weights) for weight in weights]
    quotas = [int(places) for places in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: num_places - sum(quotas)]:
        quotas[i] += 1
    return quotas
