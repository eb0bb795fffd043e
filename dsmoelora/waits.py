"""A word about waits that take longer than a moment, and how to tell that somebody is at work meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

FIRST_WORD_S = 10.0
LOOK_AT_FILES_S = 2.0


@contextmanager
def waiting_for(what: Callable[[], str], speaks: bool = True) -> Iterator[None]:
    """Log what is waited for inside the block, and since when: after ten seconds, and each time that has doubled.

    Args:
        what: is waited for, by now
        speaks: whether this process is one of those that say it
    """
    ended, began = threading.Event(), time.monotonic()

    def speak() -> None:
        after = FIRST_WORD_S
        while not ended.wait(max(0.0, began + after - time.monotonic())):
            logger.warning("Waiting for %s, since %.0f s.", what(), time.monotonic() - began)
            after *= 2

    speaker = threading.Thread(target=speak, name="waiting", daemon=True)
    if speaks:
        speaker.start()
    try:
        yield
    finally:
        ended.set()
        if speaks:
            speaker.join()


@contextmanager
def watching_growth(folder: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` inside the block whenever the files below a folder have grown, whoever writes them.

    Args:
        folder: there or not
        beat: may be called by another thread
    """
    ended = threading.Event()

    def watch() -> None:
        size = -1
        while not ended.wait(LOOK_AT_FILES_S):
            before, size = size, _num_bytes(folder)
            if size != before:
                beat()

    watcher = threading.Thread(target=watch, name="growth", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _num_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # it may be renamed just now
            total += file.stat().st_size
    return total
