"""Seconds of a collective between ranks of one machine or of several."""

from __future__ import annotations

import math

from dsmoelora.planner.devices import Device
from dsmoelora.planner.traffic import Traffic

_US, _GB = 1e-6, 1e9


def seconds_of(traffic: Traffic, device: Device) -> float:
    """Of all messages of a kind in a step, one after another.

    A ring of P ranks hands on P - 1 times (an all-reduce twice that), each hop with the latency of its link. The m
    ranks of a group that share a machine send over m network cards, by as many rings; the slower of both links is the
    ring's. An all-reduce over machines may be a tree instead, whose hops grow with the logarithm of their number; the
    faster is taken. So NCCL reckons too (src/graph/tuning.cc).
    """
    on_node = max(1, min(traffic.group_size, device.ranks_per_node // traffic.stride))
    num_nodes = math.ceil(traffic.group_size / on_node)
    inside, between = device.in_node, device.between_nodes
    times = 2 if traffic.op == "all_reduce" else 1
    hops = times * (traffic.group_size - 1)
    hops_between = times * (num_nodes - 1)
    latency = (hops - hops_between) * inside.latency_us + hops_between * between.latency_us
    bandwidth = inside.bandwidth_gbs if num_nodes == 1 else between.bandwidth_gbs * on_node
    bandwidth = min(bandwidth, inside.bandwidth_gbs) if on_node > 1 else bandwidth
    if traffic.op == "all_reduce" and num_nodes > 1:
        tree = 2 * ((on_node - 1) * inside.latency_us + math.ceil(math.log2(num_nodes)) * between.latency_us)
        latency = min(latency, tree)
    moving = traffic.sent_bytes / (bandwidth * _GB * device.efficiency.network)
    return traffic.messages * latency * _US + moving
