"""Ranks for the benchmarks that need several processes on this machine: each has a function `worker`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from dsmoelora.parallel import comm, ranks

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(benchmark: str, world_size: int, *args: str, threads: int = 1, quiet: bool = False) -> str:
    """Call `worker(*args)` of a benchmark's file on `world_size` ranks and wait; a failed rank ends the benchmark.

    Returns:
        what they printed, where they do so quietly
    """
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    pipe = subprocess.PIPE if quiet else None
    module = ".".join(Path(benchmark).resolve().relative_to(ROOT).with_suffix("").parts)
    argv = [*command, __file__, module, *args]
    return subprocess.run(argv, env=env, check=True, stdout=pipe, stderr=pipe, text=True).stdout or ""


def main() -> None:
    """One rank."""
    benchmark, *args = sys.argv[1:]
    ranks.adopt_launcher_environment()
    comm.init()
    import_module(benchmark).worker(*args)
    comm.barrier()
    comm.shutdown()


if __name__ == "__main__":
    main()
