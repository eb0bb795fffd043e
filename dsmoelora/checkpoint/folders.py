"""The folders of checkpoints: what they are called, and how one appears, is replaced and goes away.

    checkpoint-50               whole when it was written
    .checkpoint-75.partial      being written or removed; a crash leaves it behind, the next save removes it
    .checkpoint-50.replaced     the former checkpoint of a step, between two renames; a crash may leave it behind

Everything here is for rank 0 alone.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from dsmoelora.checkpoint.files import fsync_folder
from dsmoelora.checkpoint.index import faults_of_sizes, read_index
from dsmoelora.errors import CheckpointError

_logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_REPLACED = re.compile(r"\.checkpoint-(\d+)\.replaced")
_PARTIAL = re.compile(r"\.checkpoint-\d+\.partial")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"checkpoint-{step}"


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is written, or removed."""
    return root / f".checkpoint-{step}.partial"


def candidates(root: Path) -> list[Path]:
    """What may be loaded, newest first; a replaced checkpoint comes after the one that has its name."""
    found = [(step, 1, folder) for step, folder in _numbered(root, _CHECKPOINT)]
    found += [(step, 0, folder) for step, folder in _numbered(root, _REPLACED)]
    return [folder for _, _, folder in sorted(found, reverse=True)]


def begin(root: Path, step: int) -> None:
    """Make an empty partial folder, and remove what crashes left behind.

    Raises:
        OSError: the disk is full, the folder may not be written ...
    """
    root.mkdir(parents=True, exist_ok=True)
    for folder in root.iterdir():
        if _PARTIAL.fullmatch(folder.name):
            shutil.rmtree(folder)
    partial_folder(root, step).mkdir()


def publish(root: Path, step: int) -> Path:
    """Give the partial folder its name; a former checkpoint of this step goes away only after that.

    Whoever wrote the index, the last file, has synced the partial folder (see `files.write_whole`).

    Raises:
        OSError: the rename failed; the former checkpoint has its name again
    """
    partial, final, replaced = partial_folder(root, step), checkpoint_folder(root, step), _replaced_folder(root, step)
    had_former = final.exists()
    if had_former:
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if had_former:
            replaced.rename(final)
        raise
    fsync_folder(root)
    return final


def prune(root: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` up to `step`, and replaced ones; a failure is only a warning.

    Checkpoints that are plainly damaged do not count among those kept. Newer ones than `step` belong to a run that
    went on elsewhere, and folders without an index that we can read are not ours: both stay.
    """
    try:
        doomed = _superseded(root, step, keep)
    except OSError as error:
        _logger.warning("Old checkpoints in %s could not be listed: %s. Remove them by hand.", root, error)
        return
    for n, folder in doomed:
        try:
            # Under the name of a left-over first: a crash in the middle must not leave half a checkpoint.
            leaving = partial_folder(root, n)
            folder.rename(leaving)
            shutil.rmtree(leaving)
        except OSError as error:
            _logger.warning("The old checkpoint %s could not be removed: %s. Remove it by hand.", folder, error)


def _superseded(root: Path, step: int, keep: int) -> list[tuple[int, Path]]:
    found = [(n, folder, _looks_whole(folder)) for n, folder in _numbered(root, _CHECKPOINT) if n <= step]
    kept = [folder for _, folder, is_whole in sorted(found, reverse=True) if is_whole][:keep]
    doomed = [(n, folder) for n, folder, is_whole in found if is_whole is not None and folder not in kept]
    return doomed + _numbered(root, _REPLACED)


def _replaced_folder(root: Path, step: int) -> Path:
    return root / f".checkpoint-{step}.replaced"


def _numbered(root: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    matches = ((pattern.fullmatch(folder.name), folder) for folder in root.iterdir() if folder.is_dir())
    return [(int(match.group(1)), folder) for match, folder in matches if match]


def _looks_whole(folder: Path) -> bool | None:
    """None where nothing that can be read says what belongs to it."""
    try:
        files = read_index(folder).files
    except CheckpointError:
        return None
    return not faults_of_sizes(folder, files)
