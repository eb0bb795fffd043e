"""Saving and loading the training state, all ranks together.

A checkpoint is a folder `checkpoint-{step}` with a safetensors file of each rank's own part and an index of element
ranges and checksums. Ranges are counted in the tensor of all experts, so any number of ranks in any placement can load
it. The folder gets its name when it is whole, and not before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoelora.checkpoint import folders
from dsmoelora.checkpoint.files import disk_errors
from dsmoelora.checkpoint.fit import check_fit, check_lengths, check_numbers, check_savable, check_state
from dsmoelora.checkpoint.index import Index, RankFile, faults_of_content, faults_of_sizes, read_index, write_index
from dsmoelora.checkpoint.layout import (
    ShardLayout,
    decode_layouts,
    decode_parameters,
    encode_layouts,
    encode_parameters,
    packed,
    parameters_of,
    without_duplicates,
)
from dsmoelora.checkpoint.rank_file import ShardState, payload_bytes, rank_file_name, read_shards, write_rank_file
from dsmoelora.errors import CheckpointError, listing
from dsmoelora.parallel import comm

__all__ = ["ShardState", "checkpoint_bytes", "load_checkpoint", "newest_whole_checkpoint", "save_checkpoint"]

_logger = logging.getLogger(__name__)
_DISK_REMEDY = "Check room and permissions there, or set run.dir to another disk; older checkpoints are untouched."


def checkpoint_bytes(shards: list[ShardState]) -> int:
    """Bytes of the numbers that a checkpoint of all ranks holds (collective).

    Index and headers come on top: some dozen bytes for each parameter and rank.
    """
    return sum(payload_bytes(layouts) for layouts in without_duplicates(_gather_layouts(shards)))


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
    held = _gather_layouts(shards)
    check_savable(held)
    kept = without_duplicates(held)
    if comm.rank() == 0:
        num_bytes = sum(payload_bytes(layouts) for layouts in kept)
        _logger.info("Saving checkpoint-%d: %.1f MiB from %d ranks.", step, num_bytes / 2**20, len(kept))
    comm.together(lambda: _on_rank_0(folders.begin, root, step))
    try:
        own = comm.together(lambda: _write_own_file(root, step, shards, kept[comm.rank()], on_progress))
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
    """
    root = Path(root)
    damaged: list[tuple[Path, list[str]]] = []
    whole: Path | None = None
    found = comm.together(lambda: [folder.name for folder in folders.candidates(root)] if comm.rank() == 0 else [])
    for name in comm.broadcast_object(found):
        _, faults = _examine(root / name)
        if not faults:
            whole = root / name
            break
        damaged.append((root / name, faults))
    if comm.rank() == 0:
        instead = f"{whole} is used instead" if whole else "There is no whole checkpoint to use instead"
        for folder, faults in damaged:
            _logger.warning("%s is damaged and skipped: %s. %s.", folder, listing(faults), instead)
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
    index, faults = _examine(folder)
    if index is None or faults:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: {listing(faults)}. "
            "Name another folder checkpoint-N, or use `--resume auto`, which takes the newest whole one."
        )
    check(index.state)
    wanted = _gather_layouts(shards)
    check_fit(folder, index, [layout for layouts in wanted for layout in layouts])
    comm.together(lambda: read_shards(folder, index, shards))
    return index.state


def _gather_layouts(shards: list[ShardState]) -> list[list[ShardLayout]]:
    """What every rank holds, by rank, on every rank."""

    def encode() -> dict[str, Any]:
        layouts = [shard.layout for shard in shards]
        parameters = parameters_of(layouts)
        return {"parameters": encode_parameters(parameters), "shards": encode_layouts(layouts, parameters)}

    own = comm.together(encode)
    everyone = comm.all_gather_objects(own)
    return [decode_layouts(each["shards"], decode_parameters(each["parameters"])) for each in everyone]


def _examine(folder: Path) -> tuple[Index | None, list[str]]:
    """The index and everything that is wrong with a checkpoint; the faults are the same on every rank."""
    index: Index | None = None
    try:
        index = read_index(folder)
        faults = faults_of_sizes(folder, index)
        faults = faults or faults_of_content(folder, index, comm.rank(), comm.world_size())
    except CheckpointError as error:
        faults = [str(error)]
    everyone = comm.all_gather_objects(faults)
    return index, list(dict.fromkeys(fault for each in everyone for fault in each))


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


def _finish(
    root: Path,
    step: int,
    state: dict[str, Any],
    written: list[dict[str, Any] | None],
    kept: list[list[ShardLayout]],
) -> None:
    """Write the index of all ranks' files and give the folder its name."""
    files = [
        RankFile(file["name"], file["bytes"], file["blocks"], [packed(layout) for layout in layouts])
        for file, layouts in zip(written, kept, strict=True)
        if file is not None
    ]
    write_index(folders.partial_folder(root, step), Index(step, state, files))
    folders.publish(root, step)


def _on_rank_0(work: Any, root: Path, *args: Any) -> None:
    if comm.rank() == 0:
        with disk_errors(root, root, _DISK_REMEDY):
            work(root, *args)
