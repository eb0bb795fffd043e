"""Seconds of a piece of work on any accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable

from deepspeed.accelerator import get_accelerator


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the accelerator's queue drained before and after."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - start
