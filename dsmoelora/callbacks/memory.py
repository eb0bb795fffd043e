"""Peak memory of this process: of its accelerator, or on a CPU of the process itself."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from deepspeed.accelerator import get_accelerator

GIB = 2**30
_INTERVAL_S = 0.05


def resident_bytes() -> int:
    """Anonymous and shared memory of this process in RAM (RssAnon + RssShmem), in bytes.

    Mapped files are left out: the pages of safetensors files belong to the system's cache, and it can drop them.
    """
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))


class PeakMemory:
    """Keeps the peak since `start`: what the accelerator allocated, or on a CPU what `resident_bytes` showed.

    The system keeps no peak of `resident_bytes`, so a thread looks at it every 50 ms.
    """

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        self._peak = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        if self._accelerator.device_name() != "cpu":
            self._accelerator.reset_peak_memory_stats()
            return
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def gib(self) -> float:
        """The peak so far, in GiB."""
        if self._accelerator.device_name() != "cpu":
            return self._accelerator.max_memory_allocated() / GIB
        self._peak = max(self._peak, resident_bytes())
        return self._peak / GIB

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self._peak = max(self._peak, resident_bytes())
