"""Processes that run cells."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """So many processes, started afresh, none of which outlives this one, however it ends."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # a cell goes on from its last evaluation

    threading.Thread(target=watch, daemon=True).start()
