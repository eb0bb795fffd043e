"""Ranks for the benchmarks that need several processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(script: str, world_size: int, *args: str, threads: int = 1) -> None:
    """Run `script --worker ARGS` on `world_size` ranks and wait; a failed rank ends the benchmark."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    subprocess.run([*command, script, "--worker", *args], env=env, check=True)
