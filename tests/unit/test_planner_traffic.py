"""Bytes of a ring, and over which links they go, beside a count of every send."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from rich.console import Console

from dsmoelora.planner import device_named, print_traffic
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


def test_traffic_is_printed_part_by_part_for_each_kind_of_link() -> None:
    """64 ranks on nodes of 8: of a ring's bytes an eighth leaves the node; neighbours' tokens do not."""
    traffic = [
        Traffic("weights, gathered", "forward", "all_gather", 40, 2**30, 64),
        Traffic("preconditioner's sums of adapters", "step", "all_reduce", 1, 2**24, 64),
        Traffic("tokens of experts elsewhere", "backward", "all_to_all", 2000, 2**29, 8),
        Traffic("checkpoint", "checkpoint", "write", 1, 2**23, 1),
    ]
    file = io.StringIO()
    print_traffic(traffic, device_named("h100"), 64, Console(file=file, width=100))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "Sent by a rank in a step: 64 x h100" in lines[0]
    rows = {one.what: next(line.split() for line in lines if one.what in line)[-4:] for one in traffic[:3]}
    assert rows == {
        "weights, gathered": ["64", "40", "896.0", "128.0"],
        "preconditioner's sums of adapters": ["64", "1", "14.0", "2.0"],
        "tokens of experts elsewhere": ["8", "2,000", "512.0", "0.0"],
    }
    said = " ".join(lines[-3:])
    assert "1.52 GiB of a rank in 2,041 messages: 1.39 GiB inside a node, 0.13 GiB to other nodes in 41 of them" in said
    assert "a checkpoint: 8.0 MiB of a rank, 512 MiB of all" in said


def test_one_rank_sends_nothing() -> None:
    file = io.StringIO()
    print_traffic([], device_named("h100"), 1, Console(file=file))
    assert file.getvalue() == ""
