"""Jobs of this project on whatever Slurm cluster `sbatch` talks to."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dsmoelora.signs_of_life.heartbeat import read_sign
from tests.launched import ROOT, last_step

# All others are passed through: a job that is being told of its preemption is SIGNALING for a moment.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
# The tests' own processes talk over the loopback interface alone; tasks on several nodes cannot.
NOT_FOR_NODES = ("GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def slurm(*command: str, timeout_s: float = 60.0, **variables: str) -> str:
    """What a command of Slurm prints; they wait without end for a daemon that is down, so the time is limited."""
    env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_NODES} | variables
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def field_of(job_id: str, name: str) -> str:
    """A field of `scontrol show job`."""
    found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "-o", "show", "job", job_id))
    return found[1] if found else ""


def wait_for_end(job_id: str, timeout_s: float = 400.0) -> None:
    """Look often: `sbatch --wait` looks every 10 to 30 seconds."""
    deadline = time.monotonic() + timeout_s
    while field_of(job_id, "JobState") not in ENDED and time.monotonic() < deadline:
        time.sleep(0.2)


class Job:
    """A run on some nodes, submitted as a user would.

    Args:
        script: in `slurm/`
        recipe: of the run
        folder: `runs/<name>`
        argv: more for `launch/train.py`
        num_nodes: how many
        ranks_per_node: on each
        variables: more for the environment of sbatch
    """

    def __init__(
        self,
        script: str,
        recipe: Path,
        folder: Path,
        *argv: str,
        num_nodes: int = 2,
        ranks_per_node: int = 1,
        **variables: str,
    ) -> None:
        self.folder = folder
        (ROOT / "logs").mkdir(exist_ok=True)
        ranks = str(ranks_per_node)
        options = {
            "--nodes": str(num_nodes),
            "--ntasks-per-node": ranks if script in ("train.sbatch", "sweep.sbatch") else "1",
            "--gpus-per-node": ranks if "gpu:2" in slurm("sinfo", "-h", "-o", "%G") else "0",
            "--cpus-per-task": "1",
            "--time": "15",
        }
        command = ["sbatch", "--parsable", *(word for option in options.items() for word in option)]
        command += [f"slurm/{script}", str(recipe), "--run.dir", str(folder.parent), "--run.name", folder.name, *argv]
        printed = slurm(*command, RANKS_PER_NODE=ranks, **variables)
        self.id = printed.split(";")[0]

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        return field_of(self.id, name)

    def said(self) -> str:
        """What the script and the ranks of all attempts printed."""
        logs = sorted((ROOT / "logs").glob(f"*-{self.id}.*out"))
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    def wait_for_step(self, step: int, timeout_s: float = 300.0) -> None:
        """Return when the run has taken that step."""
        self.wait_until(lambda: last_step(self.folder) >= step, f"step {step}", timeout_s)

    def finish(self, timeout_s: float = 400.0) -> Job:
        """Wait for the end of the job, through all its attempts; it must have completed, and finished its run."""
        self.wait_until(lambda: self.field("JobState") in ENDED, "its end", timeout_s, may_end=True)
        assert self.field("JobState") == "COMPLETED" and (self.folder / "DONE").exists(), self.said()
        return self

    def wait_until(self, there: Callable[[], bool], what: str, timeout_s: float, may_end: bool = False) -> None:
        """Look again and again, while the job lives."""
        deadline = time.monotonic() + timeout_s
        while not there():
            ended = not may_end and self.field("JobState") in ENDED
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{what} of job {self.id} did not come\n{self.said()}")
            time.sleep(0.2)

    def cancel(self) -> None:
        """For a test that failed: nothing must be left on the cluster."""
        subprocess.run(["scancel", self.id], timeout=60, check=False)


def kill_rank(job: Job, rank: int) -> None:
    """kill -9 of one rank, which must run on this machine (as on an emulated cluster)."""
    sign = read_sign(job.folder, rank)
    assert sign is not None, f"rank {rank} of job {job.id} gives no sign of life"
    assert b"launch/train.py" in Path(f"/proc/{sign.pid}/cmdline").read_bytes(), f"{sign} is on another machine"
    os.kill(sign.pid, 9)
