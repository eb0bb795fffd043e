"""Bytes of a ring, and over which links they go, beside a count of every send."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dsmoelora.planner.traffic import Traffic, bytes_by_link, sent_bytes


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_bytes_of_a_ring(group_size: int) -> None:
    """A ring sends a P-th of the tensor in each of its rounds: P - 1 of them, or twice as many for a sum on all."""
    rounds, num_bytes = group_size - 1, 24 * group_size
    assert sent_bytes("all_gather", num_bytes, group_size) == rounds * 24
    assert sent_bytes("reduce_scatter", num_bytes, group_size) == rounds * 24
    assert sent_bytes("all_reduce", num_bytes, group_size) == 2 * rounds * 24
    assert sent_bytes("all_to_all", num_bytes, group_size) == rounds * 24
    assert sent_bytes("broadcast", num_bytes, group_size) == num_bytes


@pytest.mark.parametrize("op", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4, 8])
@pytest.mark.parametrize(("group_size", "stride"), [(16, 1), (8, 2), (4, 4), (2, 1), (4, 1)])
def test_links_of_every_send(group_size: int, stride: int, ranks_per_node: int, op: Any) -> None:
    """16 ranks: each one's sends are followed to the node of the rank that gets them."""
    world_size, sent = 16, 120_120
    inside = between = 0.0
    for first in (rank for rank in range(world_size) if rank // stride % group_size == 0):
        group = [first + stride * k for k in range(group_size)]
        ring = list(zip(group, group[1:] + group[:1], strict=True))
        pairs = ring if op == "all_gather" else list(itertools.permutations(group, 2))
        for source, target in pairs:
            num_bytes = sent * group_size / len(pairs)
            is_inside = source // ranks_per_node == target // ranks_per_node
            inside, between = inside + num_bytes * is_inside, between + num_bytes * (not is_inside)
    traffic = Traffic("anything", "forward", op, 1, sent, group_size, stride)
    assert bytes_by_link([traffic], ranks_per_node) == pytest.approx((inside / world_size, between / world_size))
