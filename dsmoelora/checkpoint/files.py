"""Writing and checking files so that a crash, a full disk or a flipped bit is noticed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dsmoelora.errors import CheckpointError

BLOCK_BYTES = 8 << 20


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all: a reader sees the old file or the new one, also after a crash."""
    unfinished = path.with_name(f".{path.name}.partial")
    with unfinished.open("wb") as file:
        file.write(content)
        flush_to_disk(file)
    unfinished.replace(path)
    fsync_folder(path.parent)


def flush_to_disk(file: BinaryIO) -> None:
    """Return when what was written to an open file lies on the disk; a full disk may show here and no earlier."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Return when the names in a folder (new files, renames) lie on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync folders by themselves and refuse to be asked
            raise
    finally:
        os.close(descriptor)


class BlockChecksums:
    """SHA-256 of every `BLOCK_BYTES` of a stream of bytes, so that many readers can share the checking of one file."""

    def __init__(self) -> None:
        self._finished: list[str] = []
        self._digest, self._room = hashlib.sha256(), BLOCK_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes."""
        view = memoryview(data)
        while view.nbytes:
            part, view = view[: self._room], view[self._room :]
            self._digest.update(part)
            self._room -= part.nbytes
            if self._room == 0:
                self._finish_block()

    def finish(self) -> list[str]:
        """The checksums as hex digits; the last block may be shorter."""
        if self._room < BLOCK_BYTES:
            self._finish_block()
        return self._finished

    def _finish_block(self) -> None:
        self._finished.append(self._digest.hexdigest())
        self._digest, self._room = hashlib.sha256(), BLOCK_BYTES


def block_checksum(file: BinaryIO, number: int) -> str:
    """SHA-256 of block `number` of an open file."""
    file.seek(number * BLOCK_BYTES)
    return hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest()


@contextmanager
def disk_errors(path: Path, disk: Path, remedy: str) -> Iterator[None]:
    """Turn an error of the operating system into a message that says what to do.

    Args:
        path: what is being written, for errors that name no file
        disk: an existing folder on the same disk
        remedy: end of the message

    Raises:
        CheckpointError: instead of the OSError
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({_free_mib(disk)} MiB are free there)"
        raise CheckpointError(f"{error.filename or path}: {reason}. {remedy}") from error


def _free_mib(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free >> 20)
    except OSError:
        return "an unknown number of"
