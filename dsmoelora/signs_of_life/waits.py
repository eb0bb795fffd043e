"""A word about waits that take longer than a moment, and how to tell that somebody is at work meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

FIRST_WORD_S = 10.0
LOOK_EVERY_S = 2.0


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
def watching(measure: Callable[[], int], beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` inside the block whenever a number has changed, such as the size of a folder, whoever changes it.

    Args:
        measure: the number by now; called, as `beat`, by another thread
        beat: notes a sign of life
    """
    ended = threading.Event()

    def watch() -> None:
        seen = None
        while not ended.wait(LOOK_EVERY_S):
            before, seen = seen, measure()
            if seen != before:
                beat()

    watcher = threading.Thread(target=watch, name="watching", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def num_bytes(folder: Path) -> int:
    """Of all files below a folder, which need not be there; what cannot be read just now is left out."""
    total = 0
    for parent, _, names in os.walk(folder):  # which, unlike `rglob`, goes on where a folder in it is renamed just now
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total
