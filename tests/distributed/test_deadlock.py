"""Two ranks that live and wait for each other: both say where, and both end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dsmoelora.parallel.watchdog import HANG_EXIT_CODE
from tests.helpers_distributed import base_environment, free_port
from tests.launched import ROOT

SCRIPT = """
import sys
from pathlib import Path
from threading import Event
from dsmoelora.parallel import comm
from dsmoelora.parallel.watchdog import watched

def wait_for_the_other():
    comm.barrier() if comm.rank() == 0 else Event().wait()

comm.init()
with watched(Path(sys.argv[1]), hang_timeout_s=3.0):
    wait_for_the_other()
"""


def test_every_rank_of_a_deadlock_prints_its_stacks_and_ends(tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=os.environ | base_environment() | address | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, stacks) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == HANG_EXIT_CODE, stacks
        assert f"error: rank {number}: no progress for" in stacks, stacks
        assert "in wait_for_the_other" in stacks, stacks
        assert "All ranks live; without progress for longest: rank" in stacks or "Without a sign of life" in stacks
