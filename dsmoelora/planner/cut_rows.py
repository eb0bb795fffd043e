"""Rows of factors that the ranks' pieces cut, and what the preconditioner's all-reduce carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.config import OptimConfig
from dsmoelora.planner.shapes import ParameterShape

_FP32 = 4


def num_cut_rows(trained: list[ParameterShape], stage: int, partition: int) -> int:
    """Rows of `a` and `b` with numbers on more than one rank of a process group.

    Args:
        trained: of one process group, in the order in which ZeRO strings them together
        stage: of ZeRO; 3 cuts each tensor by itself, 1 and 2 the whole string, 0 nothing
        partition: numbers of a rank's piece of the string
    """
    if stage == 0:
        return 0
    if stage == 3:
        return sum(_cut(one, range(one.piece, one.numel, one.piece)) for one in trained if one.numel)
    starts = accumulate((one.numel for one in trained), initial=0)
    return sum(
        _cut(one, (cut - start for cut in _between(start, one.numel, partition)))
        for one, start in zip(trained, starts, strict=False)
    )


def _between(start: int, numel: int, partition: int) -> Iterator[int]:
    """Multiples of `partition` inside a tensor that begins at `start`."""
    yield from range((start // partition + 1) * partition, start + numel, partition)


def _cut(one: ParameterShape, places: Iterable[int]) -> int:
    assert one.trainable is not None
    if one.trainable.factor not in (Factor.A, Factor.B):
        return 0
    size = one.trainable.row_size
    return len({place // size for place in places if place % size})


def step_buffer_bytes(trained: list[ParameterShape], optim: OptimConfig, num_cut: int) -> int:
    """Bytes of the buffer of one process group's all-reduce in a step (`optim/preconditioner.py`).

    With N pairs (a, b) of rank R and C cut rows, `scaled` sends `2 N R^2 + 2 C R` numbers, `tangent` `N R^2` more, and
    mixers `2 N R^2` in place of these.
    """
    factors = [one.trainable for one in trained if one.trainable is not None]
    clip = int(bool(optim.max_grad_norm_router) and any(of.factor is Factor.ROUTER for of in factors))
    # one of a pair may be frozen, so a layer's pairs are counted by whichever of its factors is trained
    of_layer = {of.layer: (one, of) for one in trained if (of := one.trainable) and of.factor in (Factor.A, Factor.B)}
    if optim.preconditioner == "none" or not of_layer:
        return _FP32 * clip
    rank = next(of.row_size for _, of in of_layer.values())
    pairs = sum(one.numel // (rank * of.shape[1]) for one, of in of_layer.values())
    has_mixers = any(of.factor is Factor.M for of in factors)
    squares = 2 + (2 if has_mixers else int(optim.preconditioner == "tangent"))
    return _FP32 * (squares * pairs * rank**2 + 2 * num_cut * rank + clip)
