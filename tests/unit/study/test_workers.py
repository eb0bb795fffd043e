"""Processes that run cells."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]


def test_no_worker_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent("""
            import os, time
            from benchmarks.study.workers import worker_pool

            if __name__ == "__main__":
                with worker_pool(1) as pool:
                    print(pool.submit(os.getpid).result(), flush=True)
                    pool.submit(time.sleep, 600)
                    time.sleep(600)
        """)
    )
    study = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert study.stdout is not None
    worker = psutil.Process(int(study.stdout.readline()))
    study.kill()
    study.communicate()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
