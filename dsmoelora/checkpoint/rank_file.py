"""The numbers: the file that a rank writes, and the elements that a rank reads from any of the files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dsmoelora.checkpoint.files import BlockChecksums, flush_to_disk
from dsmoelora.checkpoint.index import RankFile
from dsmoelora.checkpoint.layout import DTYPE_NAMES, NUM_BYTES, ShardLayout
from dsmoelora.checkpoint.table import COLUMNS, Table
from dsmoelora.errors import CheckpointError
from dsmoelora.optim.rows import Segment

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32: what is in flight between a file and a tensor


@dataclass
class ShardState:
    """The training state of one shard.

    Args:
        segments: what its numbers are; elements outside every segment are padding, neither saved nor touched by a load
        tensors: contiguous tensors by name (`value`, `exp_avg` ...), on any device; `segments` says what the numbers of
            each are when it is flattened
    """

    segments: list[Segment]
    tensors: dict[str, torch.Tensor]

    @property
    def flat(self) -> dict[str, torch.Tensor]:
        """The tensors as (N,), sharing their memory, outside of autograd."""
        return {name: tensor.detach().view(-1) for name, tensor in self.tensors.items()}

    @property
    def layout(self) -> ShardLayout:
        """What the shard holds, without the numbers."""
        segments = [segment for segment in self.segments if segment.stop > segment.start]
        return ShardLayout(segments, {name: DTYPE_NAMES[tensor.dtype] for name, tensor in self.tensors.items()})


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes: `rank-00003.safetensors`."""
    return f"rank-{rank:05d}.safetensors"


def payload_bytes(layouts: list[ShardLayout]) -> int:
    """Bytes of the numbers in the segments of these shards."""
    return sum(
        (segment.stop - segment.start) * NUM_BYTES[dtype]
        for layout in layouts
        for segment in layout.segments
        for dtype in layout.dtypes.values()
    )


def write_rank_file(
    path: Path, shards: list[ShardState], kept: list[ShardLayout], on_progress: Callable[[], None] = lambda: None
) -> tuple[int, list[str]] | None:
    """Write the `kept` segments of a rank's shards as one safetensors file, and wait until it lies on the disk.

    The bytes go from the tensors to the file and into the checksums in one pass, chunk by chunk: no second copy of
    the state in memory, and the checksum is of what was meant, not of what arrived (the library's `save_file` offers
    neither). The format is a length, a JSON header and the tensors behind one another.

    Args:
        path: the file
        shards: what the rank holds
        kept: for each shard the segments to write; in the file they lie as `table.packed` says
        on_progress: called after every chunk

    Returns:
        Size of the file in bytes and the SHA-256 of each of its blocks; None when there is nothing to write.

    Raises:
        OSError: the disk is full, the folder is gone ...
    """
    if not payload_bytes(kept):
        return None
    header = _header(kept)
    checksums, num_bytes = BlockChecksums(), 0
    with path.open("wb") as file:
        for data in (len(header).to_bytes(8, "little"), header):
            file.write(data)
            checksums.update(data)
            num_bytes += len(data)
        for shard, layout in zip(shards, kept, strict=True):
            for tensor in shard.flat.values():
                for chunk in _chunks(tensor, layout.segments):
                    file.write(chunk)
                    checksums.update(chunk)
                    num_bytes += len(chunk)
                    on_progress()
        flush_to_disk(file)
    return num_bytes, checksums.finish()


def read_shards(folder: Path, files: list[RankFile], table: Table, shards: list[ShardState]) -> None:
    """Fill the segments of `shards` from a checkpoint, whatever layout wrote it; reads the overlapping elements only.

    The table must fit the shards (see `fit.check_fit`).

    Args:
        folder: of the checkpoint
        files: of its index
        table: what they hold
        shards: what this rank holds

    Raises:
        CheckpointError: a file is not what the index says
    """
    copies = defaultdict(list)
    sources = Sources(files, table)
    for shard in shards:
        for segment in shard.layout.segments:
            for copy in sources.copies_for(segment, shard):
                copies[copy.file].append(copy)
    for name, wanted in copies.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                for copy in wanted:
                    _carry_out(copy, file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / name} cannot be read: {error}. Resume from another checkpoint."
            ) from error


@dataclass(frozen=True)
class _Copy:
    """`length` elements from offset `start` of shard number `shard` in `file` to offset `target_start` of `target`."""

    file: str
    shard: int
    start: int
    length: int
    target: ShardState
    target_start: int


def _header(layouts: list[ShardLayout]) -> bytes:
    entries: dict[str, object] = {}
    position = 0
    for k, layout in enumerate(layouts):
        num_elements = sum(segment.stop - segment.start for segment in layout.segments)
        for name, dtype in layout.dtypes.items():
            stop = position + num_elements * NUM_BYTES[dtype]
            entries[f"shard{k}.{name}"] = {"dtype": dtype, "shape": [num_elements], "data_offsets": [position, stop]}
            position = stop
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8)  # the format wants the tensors to begin at a multiple of 8


def _chunks(tensor: torch.Tensor, segments: list[Segment]) -> Iterator[memoryview]:
    """The bytes of the segments of a flat tensor, in order."""
    for segment in segments:
        for start in range(segment.span.start, segment.span.stop, _CHUNK_ELEMENTS):
            chunk = tensor[start : min(start + _CHUNK_ELEMENTS, segment.span.stop)].cpu().contiguous()
            yield chunk.view(torch.uint8).numpy().data


class Sources:
    """Where the numbers of all parameters lie in the files; segments overlap nowhere."""

    def __init__(self, files: list[RankFile], table: Table) -> None:
        self._names = [file.name for file in files]
        first = table.bases
        self._base = {of.name: int(base) for of, base in zip(table.parameters, first, strict=False)}
        starts, stops = table.spans
        order = np.argsort(starts, kind="stable")
        self._starts, self._stops, self._rows = starts[order], stops[order], table.rows[order]

    def copies_for(self, segment: Segment, target: ShardState) -> Iterator[_Copy]:
        """What fills a segment."""
        base = self._base[segment.of.name]
        position = base + segment.start
        place = int(np.searchsorted(self._starts, position, side="right")) - 1
        while position < base + segment.stop:
            source, source_stop = int(self._starts[place]), int(self._stops[place])
            assert source <= position < source_stop, f"nothing holds {segment.of.name} from {position - base} on"
            stop = min(base + segment.stop, source_stop)
            file, shard, offset = (int(self._rows[place, COLUMNS.index(name)]) for name in ("file", "shard", "offset"))
            start, target_start = offset + position - source, segment.offset + position - base - segment.start
            yield _Copy(self._names[file], shard, start, stop - position, target, target_start)
            position, place = stop, place + 1


def _carry_out(copy: _Copy, file: safe_open) -> None:
    for name, target in copy.target.flat.items():
        saved = file.get_slice(f"shard{copy.shard}.{name}")
        for done in range(0, copy.length, _CHUNK_ELEMENTS):
            length = min(_CHUNK_ELEMENTS, copy.length - done)
            begin, to = copy.start + done, copy.target_start + done
            target[to : to + length].copy_(saved[begin : begin + length])
