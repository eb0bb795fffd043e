"""What takes all ranks: equal versions, a folder that all see, a device for each, the speed between them."""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.doctor.local import Finding, device_of_this_rank, installed_versions
from dsmoelora.parallel import comm

_SEEN_WITHIN_S = 10.0  # network file systems show new files with a delay
_MAX_CLOCK_SKEW_S = 5.0
_CPU_MIB, _DEVICE_MIB, _REPEATS = 16, 256, 5


def shared_findings(run_dir: Path) -> list[Finding]:
    """Everything that takes all ranks (collective; the same on all of them)."""
    ranks = f"{comm.world_size()} on {len(set(_everyone(socket.gethostname())))} hosts"
    return [
        Finding("ranks", ranks),
        same_everywhere("versions", [f"{name} {version}" for name, version in installed_versions().items()]),
        _own_devices(),
        _clocks(),
        folder_is_shared(run_dir),
        all_reduce_speed(),
    ]


def same_everywhere(what: str, own: list[str]) -> Finding:
    """Whether a list has the same words on all ranks."""
    everyone = _everyone(own)
    for rank, words in enumerate(everyone):
        if words != everyone[0]:
            differing = ", ".join(sorted(set(words) ^ set(everyone[0])))
            remedy = "Give all nodes one environment."
            return Finding(what, "not the same", f"rank {rank} and rank 0 differ in: {differing}. {remedy}")
    return Finding(what, "the same on all ranks")


def folder_is_shared(run_dir: Path) -> Finding:
    """Whether every rank sees what every other writes below `run_dir`; leaves nothing behind."""
    probe = run_dir / f".doctor-{comm.broadcast_object(secrets.token_hex(8))}"
    made_dir = comm.broadcast_object(not run_dir.exists())
    problems = _problems(lambda: probe.mkdir(parents=True) if comm.rank() == 0 else None)
    if not any(problems):
        problems = _problems(lambda: (probe / str(comm.rank())).touch())
    if not any(problems):
        problems = _problems(lambda: _see_all(probe))
    if comm.rank() == 0:
        shutil.rmtree(probe, ignore_errors=True)
        if made_dir and run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()
    comm.barrier()
    bad = [f"rank {rank} ({problem})" for rank, problem in enumerate(problems) if problem]
    remedy = "Set run.dir to a folder on a file system that all nodes share."
    problem = f"not usable by {', '.join(bad[:4])}. {remedy}" if bad else ""
    return Finding("shared folder", str(run_dir), problem)


def all_reduce_speed() -> Finding:
    """How fast the ranks add up a large tensor: bus bandwidth, 2 (W - 1) / W times its bytes a second."""
    num_ranks = comm.world_size()
    if num_ranks == 1:
        return Finding("all-reduce", "one rank: nothing to send")
    device = torch.device(get_accelerator().current_device_name())
    mebibytes = _CPU_MIB if device.type == "cpu" else _DEVICE_MIB
    tensor = torch.empty(mebibytes << 18, dtype=torch.float32, device=device)
    seconds = []
    wrong = False
    for _ in range(_REPEATS + 1):  # the first makes connections
        tensor.fill_(comm.rank() + 1.0)
        comm.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        wrong |= bool((tensor != num_ranks * (num_ranks + 1) / 2).any())  # waits for the device as well
        seconds.append(time.perf_counter() - begin)
    bandwidth = 2 * (num_ranks - 1) / num_ranks * (mebibytes << 20) / sorted(seconds[1:])[_REPEATS // 2]
    problem = "the sum is wrong: network or driver damage data." if comm.any_rank(wrong) else ""
    return Finding("all-reduce", f"{bandwidth / 1e9:.2f} GB/s bus bandwidth ({mebibytes} MiB)", problem)


def _own_devices() -> Finding:
    devices = Counter(filter(None, _everyone(device_of_this_rank())))
    shared = [device for device, count in devices.items() if count > 1]
    problem = f"several ranks drive {', '.join(shared)}. Start one rank a device." if shared else ""
    return Finding("devices", f"{len(devices)} accelerators" if devices else "CPU cores", problem)


def _clocks() -> Finding:
    comm.barrier()
    times = _everyone(time.time())
    skew = max(times) - min(times)
    problem = "times in logs will mislead. Set up NTP on all nodes." if skew > _MAX_CLOCK_SKEW_S else ""
    return Finding("clocks", f"within {skew:.1f} s", problem)


def _see_all(probe: Path) -> None:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    missing = set(map(str, range(comm.world_size())))
    while missing and time.monotonic() < deadline:
        missing -= {file.name for file in probe.iterdir()}
        time.sleep(0.05)
    if missing:
        raise OSError(f"does not see the file of rank {min(map(int, missing))}")


def _problems(work: Callable[[], object]) -> list[str]:
    """Do something on every rank; what went wrong on each, empty where nothing did."""
    problem = ""
    try:
        work()
    except OSError as error:
        problem = error.strerror or str(error)
    return _everyone(problem)


def _everyone(own: Any) -> list[Any]:
    """What each rank says, by rank, on every rank."""
    return comm.all_gather_objects(own)
