"""What a checkpoint asks of its ranks at large numbers of them: seconds, memory and bytes, on one process.

    python benchmarks/checkpoint_index.py

The project's own code (`checkpoint.training_state`, `checkpoint.table`, `checkpoint.index`), with experts on all linear
layers of a model of Llama-2-7B's shape under ZeRO-3. The other ranks' messages are made beforehand, one after another;
timed are the work of rank 0, which looks at all of them, and of a rank that resumes with half as many. The numbers
themselves are not written: that takes as long as the disk does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig

from benchmarks.row_maps import LLAMA_2_7B, trainables_of
from dsmoelora.checkpoint import training_state
from dsmoelora.checkpoint.fit import check_fit
from dsmoelora.checkpoint.index import Index, RankFile, read_index, write_index
from dsmoelora.checkpoint.rank_file import Sources
from dsmoelora.checkpoint.table import Table, packed
from dsmoelora.checkpoint.training_state import ShardState, held_by_all, what_is_kept
from dsmoelora.optim.rows import Segment, Trainable

WORLD_SIZES = (64, 256, 1024)
MOMENTS = ("value", "exp_avg", "exp_avg_sq")


@dataclass
class OneOfMany:
    """Stands in for `parallel.comm`: rank 0 is broadcast from, and everybody's messages are gathered.

    Args:
        rank_0: what it broadcasts, as text; None on rank 0 itself
        others: messages of all ranks, as text; None where the own is only taken down
        messages: the own ones
    """

    rank_0: str | None = None
    others: list[str] | None = None
    messages: list[str] = field(default_factory=list)

    def together(self, fn: Callable[[], Any]) -> Any:
        """Nothing goes wrong."""
        return fn()

    def broadcast_object(self, obj: Any) -> Any:
        """Of rank 0."""
        self.messages.append(json.dumps(obj))
        return json.loads(self.rank_0 or self.messages[-1])

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """Of all."""
        self.messages.append(json.dumps(obj))
        return None if self.others is None else [json.loads(text) for text in self.others]


def shards_of(found: list[Trainable], world_size: int, rank: int) -> list[ShardState]:
    """What a rank holds of each tensor under ZeRO-3; the numbers have no memory."""
    segments, offset = [], 0
    for of in found:
        numel = math.prod(of.shape)
        piece = -(-numel // world_size)
        start, stop = min(piece * rank, numel), min(piece * (rank + 1), numel)
        segments.append(Segment(of, start, stop, offset))
        offset += piece
    return [ShardState(segments, {name: torch.empty(offset, device="meta") for name in MOMENTS})]


def messages_of(found: list[Trainable], world_size: int) -> tuple[str, list[str]]:
    """What rank 0 tells all, and what each rank says of its shards."""
    first = OneOfMany()
    with mock.patch.object(training_state, "comm", first):
        held_by_all(shards_of(found, world_size, 0))
    told, *said = first.messages
    for rank in range(1, world_size):
        stand_in = OneOfMany(rank_0=told)
        with mock.patch.object(training_state, "comm", stand_in):
            held_by_all(shards_of(found, world_size, rank))
        said.append(stand_in.messages[-1])
    return told, said


def table_of(found: list[Trainable], world_size: int, told: str, said: list[str]) -> Table:
    """What all ranks hold, as rank 0 puts it together."""
    with mock.patch.object(training_state, "comm", OneOfMany(told, said)):
        table = held_by_all(shards_of(found, world_size, 0))
    assert table is not None
    return table


def main() -> None:
    """Print a line for each number of ranks."""
    from machine import setting  # beside this file, where it runs as a program

    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(setting("fp32"))
    found = trainables_of(LlamaConfig(**LLAMA_2_7B), 8, 8)
    print(f"{len(found)} tensors, {sum(math.prod(of.shape) for of in found) / 1e6:.0f}M numbers")
    for world_size in WORLD_SIZES:
        told, said = messages_of(found, world_size)
        print(f"W={world_size}: rank 0 tells {len(told) / 1024:.0f} KiB; all say {_mib(sum(map(len, said)))}")
        with tempfile.TemporaryDirectory() as folder:
            measure(found, world_size, told, said, Path(folder))


def measure(found: list[Trainable], world_size: int, told: str, said: list[str], folder: Path) -> None:
    """Save as rank 0, then resume: rank 0, and a rank of half as many."""
    files = [RankFile(f"rank-{rank:05d}.safetensors", 1 << 20, ["0" * 64]) for rank in range(world_size)]

    def save() -> None:
        held = table_of(found, world_size, told, said)
        write_index(folder, Index(1, {}, files, packed(what_is_kept(held))))

    def look() -> Table:
        saved = read_index(folder).table
        check_fit(folder, saved, table_of(found, world_size, told, said))
        return saved

    def find() -> int:
        sources = Sources(files, saved)
        (shard,) = shards_of(found, world_size // 2, world_size // 4)
        return sum(1 for segment in shard.segments for _ in sources.copies_for(segment, shard))

    print(f"  save, rank 0      {_measured(save)}, index {_mib((folder / 'index.json').stat().st_size)}", flush=True)
    saved = look()
    print(f"  resume, rank 0    {_measured(look)}, {len(saved.rows):,} segments, {_mib(saved.rows.nbytes)} told to all")
    print(f"  resume, each rank {_measured(find)}, {find():,} pieces of its own", flush=True)


def _measured(work: Callable[[], Any]) -> str:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{seconds:5.2f} s, {peak / 2**20:4.0f} MiB at most"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
