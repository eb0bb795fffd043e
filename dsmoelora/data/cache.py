"""Files that are made once a machine and kept in the cache folder of `datasets`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock

from dsmoelora.errors import DataError
from dsmoelora.signs_of_life.waits import waiting_for


def cache_folder() -> Path:
    """Where these files lie."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "dsmoelora"


@contextmanager
def cache_file(identity: Sequence[object], suffix: str) -> Iterator[Path]:
    """The file of this identity, there or not yet there, held by this process alone.

    May be entered on every rank at once: the first process of a machine makes the file, the others wait and read it.

    Args:
        identity: everything that decides about the content; JSON-able
        suffix: of the file's name, e.g. `.arrow`

    Raises:
        DataError: the cache folder cannot be written
    """
    name = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:32]
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        with waiting_for(lambda: f"another process of this machine, which makes {folder / name}"):
            lock.acquire()
    except OSError as error:
        remedy = "Set the environment variable HF_DATASETS_CACHE to a folder that can be written."
        raise DataError(f"The cache folder {folder} cannot be written ({error.strerror}). {remedy}") from None
    try:
        yield folder / f"{name}{suffix}"
    finally:
        lock.release()
