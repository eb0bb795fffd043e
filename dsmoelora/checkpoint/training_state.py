"""Saving and loading the training state, all ranks together.

A checkpoint is a folder `checkpoint-{step}` with a safetensors file of each rank's own part and an index of element
ranges and checksums. Ranges are counted in the tensor of all experts, so any number of ranks in any placement can load
it. The folder gets its name when it is whole, and not before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmoelora.checkpoint import folders
from dsmoelora.checkpoint.files import disk_errors
from dsmoelora.checkpoint.fit import check_fit, check_lengths, check_numbers, check_savable, check_state
from dsmoelora.checkpoint.index import Index, RankFile, faults_of_content, faults_of_sizes, read_index, write_index
from dsmoelora.checkpoint.layout import ShardLayout, decode_parameters, encode_parameters
from dsmoelora.checkpoint.rank_file import ShardState, rank_file_name, read_shards, write_rank_file
from dsmoelora.checkpoint.table import COLUMNS, Table, as_text, from_text, joined, packed, rows_of, without_duplicates
from dsmoelora.errors import CheckpointError, listing
from dsmoelora.parallel import comm

__all__ = ["ShardState", "checkpoint_bytes", "load_checkpoint", "newest_whole_checkpoint", "save_checkpoint"]

_logger = logging.getLogger(__name__)
_DISK_REMEDY = "Check room and permissions there, or set run.dir to another disk; older checkpoints are untouched."


def checkpoint_bytes(shards: list[ShardState]) -> int:
    """Bytes of the numbers that a checkpoint of all ranks holds (collective).

    Index and headers come on top: some dozen bytes for each parameter and rank.
    """
    held = held_by_all(shards)
    num_bytes = comm.together(lambda: 0 if held is None else without_duplicates(held).num_bytes)
    return int(comm.broadcast_object(num_bytes))


def save_checkpoint(
    root: Path,
    step: int,
    shards: list[ShardState],
    state: dict[str, Any],
    keep: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Write `root/checkpoint-{step}`, then remove all but the newest `keep` (collective).

    Ranges that several ranks hold are written by the lowest of them. When anything fails on any rank, all ranks raise,
    nothing is left of the attempt, and older checkpoints stay as they were.

    Args:
        root: folder of all checkpoints of a run, on a disk that all ranks share
        step: optimizer steps taken
        shards: what this rank holds
        state: JSON-able and the same on all ranks; floats come back bit-equal, tuples as lists
        keep: 1 or more
        on_progress: called for every chunk that is written

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a value is not finite, a tensor is empty, a range is held by nobody, the disk is full ...
        UserError: on the other ranks, with the message of the rank that failed
    """
    assert keep >= 1, "a checkpoint that is removed at once is a mistake"
    root = Path(root)
    comm.together(lambda: _check_own(shards, state))
    held = held_by_all(shards)
    kept = comm.together(lambda: None if held is None else what_is_kept(held))
    own_kept = _own_part(shards, held, kept)
    if kept is not None:
        num_files = len(np.unique(kept.column("file")))
        _logger.info("Saving checkpoint-%d: %.1f MiB in %d files.", step, kept.num_bytes / 2**20, num_files)
    comm.together(lambda: _on_rank_0(folders.begin, root, step))
    try:
        own = comm.together(lambda: _write_own_file(root, step, shards, own_kept, on_progress))
        files = comm.gather_objects(own)
        comm.together(lambda: _on_rank_0(_finish, root, step, state, files, kept))
    except BaseException:
        if comm.rank() == 0:
            shutil.rmtree(folders.partial_folder(root, step), ignore_errors=True)
        raise
    if comm.rank() == 0:
        folders.prune(root, step, keep)
    comm.barrier()  # nobody may look for checkpoints while old ones are on their way out
    return folders.checkpoint_folder(root, step)


def newest_whole_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below `root` whose index, sizes and checksums are right (collective).

    Each rank checks an equal part of all bytes. Damaged checkpoints are skipped with a warning on rank 0 that says what
    is wrong and what is used instead. None when there is none.

    Raises:
        CheckpointError: all that there are are damaged, or cannot be read
    """
    root = Path(root)
    damaged: list[tuple[Path, list[str]]] = []
    whole: Path | None = None
    found = comm.together(lambda: [folder.name for folder in folders.candidates(root)] if comm.rank() == 0 else [])
    for name in comm.broadcast_object(found):
        if not (faults := _examine(root / name)[-1]):
            whole = root / name
            break
        damaged.append((root / name, faults))
    if damaged and whole is None:
        folder, faults = damaged[0]
        others = f"; nor is any of {len(damaged) - 1} older ones" if damaged[1:] else ""
        raise CheckpointError(
            f"{folder} is no whole checkpoint: {listing(faults)}{others}. "
            "Make them readable again, or move them away to begin at step 0."
        )
    if comm.rank() == 0:
        for folder, faults in damaged:
            _logger.warning("%s is damaged and skipped: %s. %s is used instead.", folder, listing(faults), whole)
    return whole


def load_checkpoint(
    folder: Path, shards: list[ShardState], check: Callable[[dict[str, Any]], object] = lambda _: None
) -> dict[str, Any]:
    """Fill the tensors of `shards` in place from a checkpoint of any layout, and return its state (collective).

    Checksums are verified first, an equal part of all bytes by each rank; then each rank reads the ranges that it
    holds. Beside the shards it needs some MiB of memory. Padding stays as it is.

    Args:
        folder: of the checkpoint
        shards: what this rank holds
        check: gets the state before anything else is compared, and raises to refuse it

    Raises:
        CheckpointError: the folder is damaged, or its parameters, shapes or optimizer tensors are not those of `shards`
        UserError: on the other ranks, when something fails on one rank alone
    """
    folder = Path(folder)
    comm.together(lambda: check_lengths(shards))
    index, files, state, faults = _examine(folder)
    if faults:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: {listing(faults)}. "
            "Name another folder checkpoint-N, or use `--resume auto`, which takes the newest whole one."
        )
    check(state)
    wanted = held_by_all(shards)
    misfit = comm.together(lambda: _misfit(folder, index, wanted))
    if misfit := comm.broadcast_object(misfit):
        raise CheckpointError(misfit)
    table = _from_rank_0(None if index is None else index.table)
    comm.together(lambda: read_shards(folder, files, table, shards))
    return state


def held_by_all(shards: list[ShardState]) -> Table | None:
    """What all ranks hold, on rank 0, which looks at it for all; None on the others (collective).

    Names and shapes are long, and most of them the same on all ranks, so each refers to those of rank 0.
    """
    layouts = comm.together(lambda: [shard.layout for shard in shards])
    own = list(dict.fromkeys(segment.of for layout in layouts for segment in layout.segments))
    known = decode_parameters(comm.broadcast_object(encode_parameters(own)))
    of_rank_0 = set(known)
    more = [of for of in own if of not in of_rank_0]
    places = {of: place for place, of in enumerate([*known, *more])}
    kinds = [dict(kind) for kind in dict.fromkeys(tuple(layout.dtypes.items()) for layout in layouts)]
    own_rows = as_text(rows_of(layouts, places, kinds))
    everyone = comm.gather_objects({"more": encode_parameters(more), "kinds": kinds, "rows": own_rows})

    def join() -> Table | None:
        if everyone is None:
            return None
        parts = ((decode_parameters(each["more"]), each["kinds"], from_text(each["rows"])) for each in everyone)
        return joined(known, parts)

    return comm.together(join)


def what_is_kept(held: Table) -> Table:
    """Of what all ranks hold that which is written, each element once.

    Raises:
        CheckpointError: it makes no whole checkpoint
    """
    check_savable(held)
    return without_duplicates(held)


def _own_part(shards: list[ShardState], held: Table | None, kept: Table | None) -> list[ShardLayout]:
    """For each shard of this rank the segments that it writes (collective).

    Args:
        shards: of this rank
        held: what all ranks hold, on rank 0
        kept: what of it is written, on rank 0
    """
    pieces = None
    if held is not None and kept is not None and kept is not held:
        columns = [COLUMNS.index(name) for name in ("shard", "start", "stop", "offset")]
        pieces = [kept.rows[kept.column("file") == rank][:, columns].tolist() for rank in range(comm.world_size())]
    pieces = comm.broadcast_object(pieces)
    layouts = [shard.layout for shard in shards]
    if pieces is None:  # all ranks write all that they hold
        return layouts
    own = pieces[comm.rank()]
    return [layout.kept([piece[1:] for piece in own if piece[0] == k]) for k, layout in enumerate(layouts)]


def _examine(folder: Path) -> tuple[Index | None, list[RankFile], dict[str, Any], list[str]]:
    """On rank 0 the index; on all the files, the state, and everything that is wrong with a checkpoint (collective)."""

    def look() -> tuple[Index | None, dict[str, Any]]:
        if comm.rank() > 0:
            return None, {}
        try:
            index = read_index(folder)
            files = [astuple(file) for file in index.files]
            return index, {"state": index.state, "files": files, "faults": faults_of_sizes(folder, index.files)}
        except CheckpointError as error:
            return None, {"faults": [str(error)]}

    index, seen = comm.together(look)
    seen = comm.broadcast_object(seen)
    if seen["faults"]:
        return None, [], {}, seen["faults"]
    files = [RankFile(*each) for each in seen["files"]]
    everyone = comm.all_gather_objects(faults_of_content(folder, files, comm.rank(), comm.world_size()))
    return index, files, seen["state"], list(dict.fromkeys(fault for each in everyone for fault in each))


def _misfit(folder: Path, index: Index | None, wanted: Table | None) -> str:
    """Why rank 0 cannot have what all ranks want from a checkpoint; empty where it can."""
    if index is not None and wanted is not None:
        try:
            check_fit(folder, index.table, wanted)
        except CheckpointError as error:
            return str(error)
    return ""


def _from_rank_0(table: Table | None) -> Table:
    """Rank 0's table on every rank (collective)."""
    said: dict[str, Any] = {}
    if table is not None:
        parameters = encode_parameters(table.parameters)
        said = {"parameters": parameters, "kinds": table.kinds, "num_rows": len(table.rows)}
    said = comm.broadcast_object(said)
    rows = torch.zeros(said["num_rows"], len(COLUMNS), dtype=torch.int64)
    if table is not None:
        rows = torch.from_numpy(table.rows)
    return Table(decode_parameters(said["parameters"]), said["kinds"], comm.broadcast_tensor(rows).numpy())


def _check_own(shards: list[ShardState], state: dict[str, Any]) -> None:
    check_numbers(shards)
    check_state(state)


def _write_own_file(
    root: Path, step: int, shards: list[ShardState], kept: list[ShardLayout], on_progress: Callable[[], None]
) -> dict[str, Any] | None:
    path = folders.partial_folder(root, step) / rank_file_name(comm.rank())
    with disk_errors(path, root, _DISK_REMEDY):
        written = write_rank_file(path, shards, kept, on_progress)
    # The runs are known to rank 0 already.
    return None if written is None else {"name": path.name, "bytes": written[0], "blocks": written[1]}


def _finish(root: Path, step: int, state: dict[str, Any], written: list[dict[str, Any] | None], kept: Table) -> None:
    """Write the index of all ranks' files and give the folder its name."""
    files = [RankFile(file["name"], file["bytes"], file["blocks"]) for file in written if file is not None]
    number = np.cumsum([file is not None for file in written]) - 1  # some ranks have nothing to write
    table = packed(kept).with_columns(file=number[kept.column("file")])
    write_index(folders.partial_folder(root, step), Index(step, state, files, table))
    folders.publish(root, step)


def _on_rank_0(work: Any, root: Path, *args: Any) -> None:
    if comm.rank() == 0:
        with disk_errors(root, root, _DISK_REMEDY):
            work(root, *args)
