"""The worst moment of a micro-batch: gathered weights, activations and gradients are not at their most together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsmoelora.planner.gathering import Gathered


@dataclass(frozen=True)
class Moment:
    """Bytes that are there at a time.

    Args:
        gathered: weights
        kept: activations that the backward pass needs
        gradients: that have come so far
    """

    gathered: float
    kept: float
    gradients: float

    @property
    def num_bytes(self) -> float:
        """In all."""
        return self.gathered + self.kept + self.gradients


def worst_moment(gathered: Gathered, itemsize: int, kept: float, gradients: float) -> Moment:
    """When most is there.

    A module that begins adds its share to what is kept in the forward pass; in the backward pass it takes it away, and
    its gradients come. All modules that begin are taken to have the same share, for layers are alike.

    Args:
        gathered: weights, as modules begin
        itemsize: bytes of a number of them
        kept: bytes at the end of the forward pass
        gradients: bytes that come in the backward pass
    """
    moments = (Moment(itemsize * numel, kept * k, gradients * g) for numel, k, g in _shares(gathered))
    return max(moments, key=lambda one: one.num_bytes)


def _shares(gathered: Gathered) -> Iterator[tuple[int, float, float]]:
    """Numbers that are gathered, and the shares of what is kept and of gradients that are there."""
    forward, backward = gathered.there[False], gathered.there[True]
    for place, numel in enumerate(forward, start=1):
        yield numel, place / len(forward), 0.0
    yield 0, 1.0, 0.0
    for place, numel in enumerate(backward):
        yield numel, 1 - place / len(backward), place / len(backward)
    yield 0, 0.0, 1.0
