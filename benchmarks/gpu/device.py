"""The device of a benchmark, and milliseconds on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

NO_GPU = (
    "torch sees no CUDA device. `--dry-run` runs a tiny shape in fp32 on this machine, to see that the benchmark works."
)


def chosen(dry_run: bool) -> torch.device:
    """The GPU, or the CPU for a dry run; ends the program where there is no GPU."""
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int, warm_up: int = 3) -> float:
    """Median of one call, by CUDA events; by the clock on a CPU."""
    for _ in range(warm_up):
        work()
    return statistics.median(_once(work, device) for _ in range(rounds))


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def num_kernels(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that one call launches; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type is torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_gib(device: torch.device) -> float:
    """Most memory that tensors have taken since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak
