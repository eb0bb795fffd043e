"""Ways to spread the same parameters over ranks, for tests of what must not depend on the placement.

`Segments` of a rank are lists of segments, one list a shard; `shards_of` gives them numbers out of the whole tensors.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import torch

from dsmoelora.adapters import Factor
from dsmoelora.checkpoint.training_state import ShardState
from dsmoelora.optim.rows import Segment, Trainable

Segments = list[list[Segment]]
Numbers = dict[str, dict[str, torch.Tensor]]  # tensor name -> parameter name -> the whole tensor, flattened


def some_parameters(rng: random.Random, num_experts: int, num_layers: int = 2) -> list[Trainable]:
    """The factors and routers of a few layers, some of them smaller than any number of ranks."""
    found = []
    for k in range(num_layers):
        layer, rank = f"layers.{k}.proj", rng.choice([1, 2, 3])
        features = rng.choice([1, 2, 7, 16]), rng.choice([1, 5, 12])
        found.append(Trainable(f"{layer}.experts.a", layer, Factor.A, (num_experts, features[0], rank)))
        found.append(Trainable(f"{layer}.experts.b", layer, Factor.B, (num_experts, features[1], rank)))
        found.append(Trainable(f"{layer}.router.weight", layer, Factor.ROUTER, (num_experts, features[0])))
    return found


def random_numbers(parameters: list[Trainable], names: list[str], seed: int) -> Numbers:
    """Normal fp32 numbers for every tensor name and parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {each.name: torch.randn(math.prod(each.shape), generator=generator) for each in parameters}
        for name in names
    }


def per_parameter(parameters: list[Trainable], world_size: int) -> list[Segments]:
    """ZeRO-3: every parameter padded and cut into equal pieces; the pieces of a rank in one shard."""
    return [
        [_pieces_of(rank, world_size, [(each, 0, math.prod(each.shape)) for each in parameters])]
        for rank in range(world_size)
    ]


def over_experts(parameters: list[Trainable], world_size: int, ep_size: int) -> list[Segments]:
    """Experts over ranks `ep_size` at a time, each expert's replicas cut as in ZeRO-3; routers cut over all ranks."""
    ranks = []
    for rank in range(world_size):
        place, replica = rank % ep_size, rank // ep_size
        experts = []
        for each in parameters:
            if each.factor is not Factor.ROUTER:
                size = math.prod(each.shape) // ep_size
                experts.append((each, place * size, (place + 1) * size))
        routers = [(each, 0, math.prod(each.shape)) for each in parameters if each.factor is Factor.ROUTER]
        ranks.append([_pieces_of(replica, world_size // ep_size, experts), _pieces_of(rank, world_size, routers)])
    return ranks


def one_buffer(parameters: list[Trainable], world_size: int) -> list[Segments]:
    """ZeRO-1 and 2: all parameters behind one another, cut into equal pieces; the last ranks may hold padding alone."""
    total = sum(math.prod(each.shape) for each in parameters)
    size = math.ceil(total / world_size / 4) * 4
    ranks: list[Segments] = []
    for rank in range(world_size):
        begin, end, position, segments = rank * size, (rank + 1) * size, 0, []
        for each in parameters:
            numel = math.prod(each.shape)
            start, stop = max(begin - position, 0), min(end - position, numel)
            if start < stop:
                segments.append(Segment(each, start, stop, position + start - begin))
            position += numel
        ranks.append([segments])
    return ranks


def replicated(parameters: list[Trainable], world_size: int) -> list[Segments]:
    """No ZeRO: every rank holds every parameter, each in a shard of its own."""
    return [[[Segment(each, 0, math.prod(each.shape), 0)] for each in parameters] for _ in range(world_size)]


def scattered(parameters: list[Trainable], world_size: int, rng: random.Random) -> list[Segments]:
    """Anything goes: random cuts on random ranks, replicas, holes in the shards, ranks without segments."""
    ranks: list[Segments] = [[[], []] for _ in range(world_size)]
    ends = [[0, 0] for _ in range(world_size)]
    for each in parameters:
        numel = math.prod(each.shape)
        inner = rng.sample(range(1, numel), min(numel - 1, rng.randint(0, 4)))
        cuts = sorted({0, numel, *inner})
        pieces = list(pairwise(cuts))
        start = rng.randrange(numel)
        pieces.append((start, rng.randint(start + 1, numel)))  # held twice
        for start, stop in pieces:
            rank, shard = rng.randrange(world_size), rng.randrange(2)
            offset = ends[rank][shard] + rng.choice([0, 0, 3])
            ranks[rank][shard].append(Segment(each, start, stop, offset))
            ends[rank][shard] = offset + stop - start
    return ranks


def any_layout(parameters: list[Trainable], world_size: int, rng: random.Random) -> list[Segments]:
    """One of the placements above."""
    num_experts = parameters[0].shape[0]
    ep_sizes = [n for n in range(2, world_size + 1) if world_size % n == 0 and num_experts % n == 0]
    kind = rng.choice(["per_parameter", "one_buffer", "replicated", "scattered", *["over_experts"] * bool(ep_sizes)])
    if kind == "over_experts":
        return over_experts(parameters, world_size, rng.choice(ep_sizes))
    if kind == "scattered":
        return scattered(parameters, world_size, rng)
    return {"per_parameter": per_parameter, "one_buffer": one_buffer, "replicated": replicated}[kind](
        parameters, world_size
    )


def shards_of(segments: Segments, numbers: Numbers, padding: float) -> list[ShardState]:
    """The shards of a rank with the numbers of its segments, and `padding` everywhere else."""
    shards = []
    for each in segments:
        size = max((segment.span.stop for segment in each), default=0) + 3
        tensors = {name: torch.full((size,), padding) for name in numbers}
        for name, tensor in tensors.items():
            for segment in each:
                tensor[segment.span] = numbers[name][segment.of.name][segment.start : segment.stop]
        shards.append(ShardState(each, tensors))
    return shards


def blank_shards(segments: Segments, names: list[str], filling: float) -> list[ShardState]:
    """The shards of a rank before a load, filled with one number."""
    shards = []
    for each in segments:
        size = max((segment.span.stop for segment in each), default=0) + 3
        shards.append(ShardState(each, {name: torch.full((size,), filling) for name in names}))
    return shards


def _pieces_of(rank: int, world_size: int, ranges: list[tuple[Trainable, int, int]]) -> list[Segment]:
    segments, offset = [], 0
    for each, begin, end in ranges:
        size = math.ceil((end - begin) / world_size)
        start, stop = min(begin + rank * size, end), min(begin + (rank + 1) * size, end)
        if start < stop:
            segments.append(Segment(each, start, stop, offset))
        offset += size  # with the padding of the last pieces
    return segments
