"""The C heap of this process, where host memory is the memory that models are loaded into."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BYTES, _LARGEST_ALLOWED_BYTES, _KEPT_BYTES = 1 << 20, 1 << 25, 1 << 28


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside the block, every tensor above 1 MiB has pages of its own, which go back to the system when it is freed.

    glibc raises that limit by itself as large tensors come and go. Then the pieces that ZeRO-3 keeps and the whole
    layers that it gathers for a moment share one heap, whose holes a rank pays for (`benchmarks/load_memory.py` prints
    the peak). Afterwards the limit is as high as it may be, for training allocates the same sizes in
    every step and would fault every page in anew. Without glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_ALLOWED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
