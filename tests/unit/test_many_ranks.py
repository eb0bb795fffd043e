"""The real maps of shards on 64 to 1,024 ranks, against the planner's formulas."""

from __future__ import annotations

import math

import pytest
from transformers import LlamaConfig

from benchmarks.row_maps import StandIn, trainables_of
from dsmoelora.config import OptimConfig
from dsmoelora.optim.preconditioner import Preconditioner
from dsmoelora.planner.cut_rows import num_cut_rows, step_buffer_bytes
from dsmoelora.planner.shapes import ParameterShape

SMALL = LlamaConfig(hidden_size=96, intermediate_size=208, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


@pytest.mark.parametrize("world_size", [64, 256, 1008, 1024])
@pytest.mark.parametrize(("num_experts", "rank"), [(4, 4), (5, 6)])
def test_shards_cover_everything_once_and_cut_what_is_planned(world_size: int, num_experts: int, rank: int) -> None:
    found = trainables_of(SMALL, num_experts, rank)
    ranks = StandIn(found, world_size)
    answers = ranks.answers()
    planned = [ParameterShape(of.name, math.prod(of.shape), world_size, of) for of in found]
    num_cut = num_cut_rows(planned, stage=3, partition=0)
    optim = OptimConfig(preconditioner="tangent")
    for place in (0, world_size // 2, world_size - 1):
        group = ranks.group_of(place, answers)
        (shard,) = group.shards
        assert shard.tensor.numel() == sum(one.piece for one in planned)
        for one in planned:
            held = [(segment.start, segment.stop) for segment in shard.segments if segment.of is one.trainable]
            start, stop = one.piece * place, min(one.piece * (place + 1), one.numel)
            assert held == ([(start, stop)] if start < stop else [])
        assert len(group.cut_rows) == num_cut
        sent = Preconditioner(group, optim, frozen={}).shapes
        assert 4 * sum(map(math.prod, sent.values())) == step_buffer_bytes(planned, optim, num_cut)


def test_ranks_tell_each_other_of_rows_that_are_cut_and_of_no_others() -> None:
    """Routers' rows are cut by nearly every border, and nobody needs them whole."""
    found = trainables_of(SMALL, 4, 4)
    widths_that_divide = StandIn(found, 16)  # 4 * 96 * 4 / 16 is whole rows of 4, and so is 4 * 208 * 4 / 16
    assert set(widths_that_divide.answers()) == {"[]"}
