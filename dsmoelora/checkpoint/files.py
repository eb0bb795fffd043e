"""Writing and checking files so that a crash, a full disk or a flipped bit is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsmoelora.errors import CheckpointError

_CHUNK_BYTES = 1 << 20


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all: a reader sees the old file or the new one, also after a crash."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    with unfinished.open("wb") as file:
        file.write(text.encode())
        flush_to_disk(file.fileno())
    unfinished.replace(path)
    fsync_folder(path.parent)


def flush_to_disk(descriptor: int) -> None:
    """Return when what was written to an open file lies on the disk; a full disk may show here and no earlier."""
    os.fsync(descriptor)


def fsync_folder(folder: Path) -> None:
    """Return when the names in a folder (new files, renames) lie on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush_to_disk(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync folders by themselves and refuse to be asked
            raise
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
