"""The real maps of shards on 64 to 1,024 ranks, against the planner's formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from benchmarks.checkpoint_index import messages_of, shards_of, table_of
from benchmarks.row_maps import StandIn, trainables_of
from dsmoelora.checkpoint.index import Index, RankFile, read_index, write_index
from dsmoelora.checkpoint.layout import ShardLayout
from dsmoelora.checkpoint.rank_file import Sources
from dsmoelora.checkpoint.table import joined, packed, rows_of, without_duplicates
from dsmoelora.checkpoint.training_state import what_is_kept
from dsmoelora.config import OptimConfig
from dsmoelora.optim.preconditioner import Preconditioner
from dsmoelora.optim.rows import Segment, Trainable
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


@pytest.mark.parametrize("world_size", [64, 1008, 1024])
def test_what_a_checkpoint_asks_of_its_ranks(world_size: int, tmp_path: Path) -> None:
    """Names and shapes are told once, and rank 0 alone puts together who holds what."""
    found = trainables_of(SMALL, 4, 4)
    told, said = messages_of(found, world_size)
    assert len(json.loads(told)) == len(found)
    assert all(json.loads(text)["more"] == [] for text in said)
    assert max(map(len, said)) < 40 * len(found), "bytes of a rank for each tensor"

    kept = what_is_kept(table_of(found, world_size, told, said))
    numels = [math.prod(of.shape) for of in found]
    pieces = [-(-numel // world_size) for numel in numels]
    num_held = [-(-numel // piece) for numel, piece in zip(numels, pieces, strict=True)]
    assert len(kept.rows) == sum(num_held)
    assert kept.num_bytes == 3 * 4 * sum(numels)

    files = [RankFile(f"rank-{rank:05d}.safetensors", 1, []) for rank in range(world_size)]
    write_index(tmp_path, Index(1, {}, files, packed(kept)))
    index = read_index(tmp_path)
    assert index.files == files
    assert_all_lie_where_they_should(Sources(index.files, index.table), found, world_size, of_ranks=48)


def assert_all_lie_where_they_should(sources: Sources, found: list[Trainable], world_size: int, of_ranks: int) -> None:
    """What some ranks of fewer read, against where a cut into equal pieces has put each number."""
    for rank in (0, of_ranks // 2, of_ranks - 1):
        (shard,) = shards_of(found, of_ranks, rank)
        for segment in shard.segments:
            position, offset = segment.start, segment.offset
            for copy in sources.copies_for(segment, shard):
                file, start = lies_at(found, found.index(segment.of), position, world_size)
                assert (copy.file, copy.start) == (f"rank-{file:05d}.safetensors", start)
                assert copy.target_start == offset
                position, offset = position + copy.length, offset + copy.length
            assert position == segment.stop


def lies_at(found: list[Trainable], place: int, element: int, world_size: int) -> tuple[int, int]:
    """File of an element, and its place in it behind the pieces of the tensors before."""
    numels = [math.prod(of.shape) for of in found[: place + 1]]
    *before, piece = (-(-numel // world_size) for numel in numels)
    file = element // piece
    held = (max(0, min(one * (file + 1), numel) - one * file) for one, numel in zip(before, numels, strict=False))
    return file, sum(held) + element % piece


def test_replicas_of_many_ranks_are_kept_once() -> None:
    found = trainables_of(SMALL, 4, 4)
    whole = [Segment(of, 0, math.prod(of.shape), 0) for of in found]
    layouts = [ShardLayout([segment], {"value": "F32"}) for segment in whole]
    rows = np.array(rows_of(layouts, {of: place for place, of in enumerate(found)}, [layouts[0].dtypes]))
    held = joined(found, (([], [layouts[0].dtypes], rows) for _ in range(1024)))
    assert len(held.rows) == 1024 * len(found)
    assert np.array_equal(without_duplicates(held).rows, rows)
