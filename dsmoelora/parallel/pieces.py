"""What each rank holds of parameters that nobody trains, looked at where it lies: nothing is gathered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.optim.rows import Segment, Trainable
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.placement import ExpertPlacement


def held_pieces(
    found: Iterable[tuple[Trainable, nn.Parameter]], placement: ExpertPlacement
) -> list[tuple[list[Segment], Tensor]]:
    """What this rank holds of tensors that nobody trains: the memory itself, and what its numbers are.

    Where they are written to, `zero.push_master_weights` lets whole copies follow.
    """
    pieces = []
    for trainable, parameter in found:
        first = placement.experts_of(trainable).start * math.prod(trainable.shape[1:])
        piece, start = zero.held_piece(parameter)
        stop = min(start + piece.numel(), zero.full_numel(parameter))
        segments = [Segment(trainable, first + start, first + stop, 0)] if start < stop else []
        pieces.append((segments, piece))
    return pieces


def numbers_at(parameters: Sequence[Any], places: Sequence[Tensor]) -> list[Tensor]:
    """The numbers at these places of flattened parameters, in fp32, on every rank (collective).

    Every rank brings those that it holds; only what lies on NVMe is gathered.

    Args:
        parameters: partitioned or not; the same on all ranks
        places: indices (P,) for each
    """
    own = []
    for parameter, at in zip(parameters, places, strict=True):
        is_whole = not zero.is_partitioned(parameter)
        piece, first = zero.held_piece(parameter)
        if not piece.numel():
            with zero.gathered([parameter]):
                piece, is_whole = parameter.detach().flatten().clone(), True
        within = (at >= first) & (at < first + piece.numel())
        is_mine = torch.full(at.shape, comm.rank() == 0) if is_whole else within
        held = torch.zeros(at.shape)
        held[is_mine] = piece[(at[is_mine] - first).to(piece.device)].float().cpu()
        own += held.tolist()
    summed = torch.tensor(comm.all_reduce_sum(own), dtype=torch.float32)
    return list(summed.split([len(at) for at in places]))


def first_not_finite(named: Iterable[tuple[str, Any]]) -> str | None:
    """The first parameter with a number that is not finite, looked for in every rank's own pieces (collective).

    Args:
        named: the same on all ranks
    """
    names, is_bad = [], []
    for name, parameter in named:
        names.append(name)
        piece, _ = zero.held_piece(parameter)
        is_bad.append(float(not torch.isfinite(piece).all()))  # pieces lie on several devices with offloading
    counts = comm.all_reduce_sum(is_bad)
    return next((name for name, count in zip(names, counts, strict=True) if count), None)
