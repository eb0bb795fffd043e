"""Many tensors in few collectives: each costs the latency of all ranks, however little it carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dsmoelora.parallel import comm

Item = TypeVar("Item")


def in_buckets(items: Iterable[Item], numel: Callable[[Item], int], room: int) -> list[list[Item]]:
    """Neighbours together, as far as no bucket has more numbers than `room`; what has more itself is alone."""
    buckets: list[list[Item]] = []
    free = 0
    for item in items:
        if not buckets or numel(item) > free:
            buckets.append([])
            free = room
        buckets[-1].append(item)
        free -= numel(item)
    return buckets


def gather_pieces(pieces: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Flat tensors that the P ranks of a process group hold in equal pieces, all in one all-gather (collective).

    Args:
        pieces: (n_i,) of this rank, of one dtype, on any device
        group: process group; None for that of all ranks

    Returns:
        (P n_i,) of each, on the accelerator; what fills up the last pieces is at the end
    """
    device = get_accelerator().current_device_name()
    own_N = torch.cat([piece.detach().to(device) for piece in pieces])
    of_ranks_PN = comm.all_gather_tensor(own_N, group).view(dist.get_world_size(group), -1)
    return [of_ranks_Pn.reshape(-1) for of_ranks_Pn in of_ranks_PN.split([piece.numel() for piece in pieces], dim=1)]
