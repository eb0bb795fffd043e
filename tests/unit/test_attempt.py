"""When `slurm/attempt.sh` requeues a job: bash runs it with a step, a `scontrol` and an `srun` of our own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launched import ROOT

# `launch/train.py --print_folder` says where the run lies; `scontrol requeue` ends the script, as Slurm does.
SCRIPT = f"""
set -euo pipefail
source {ROOT}/slurm/attempt.sh
python=./python
container=(./inside)
scontrol() {{ echo "requeued $2"; kill $$; }}
export -f scontrol
timeout() {{ shift; "$@"; }}
srun() {{ [[ ! -e lost ]]; }}
begin_attempt recipe.yaml
run_attempt bash step.sh
"""


def start(folder: Path, step: str, **variables: str) -> subprocess.Popen[str]:
    """The script in a folder of its own, in which `step` is what the ranks do."""
    # python is to be found in the container alone
    for name, text in (("inside", "shift; echo run"), ("python", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "step.sh").write_text(step)
    (folder / "run" / "checkpoint-5").mkdir(parents=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    return subprocess.Popen(
        ["bash", "-c", SCRIPT],
        cwd=folder,
        env=os.environ | job | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


SAVED = "mkdir run/checkpoint-8; "


@pytest.mark.parametrize(
    ("step", "variables", "requeued", "said"),
    [
        (SAVED + "touch run/DONE", {}, False, "is finished"),
        (SAVED, {}, True, "at checkpoint 8"),
        ("true", {}, False, "No checkpoint newer than 5"),
        (SAVED + "echo why > run/FAILED; exit 1", {"REQUEUE_ON_FAILURE": "1"}, False, "cannot succeed as it is: why"),
        (SAVED, {"SLURM_RESTART_COUNT": "20"}, False, "the last attempt: MAX_REQUEUES is 20"),
        (SAVED, {"MAX_REQUEUES": "0"}, False, "the last attempt"),
        (SAVED + "exit 3", {}, False, "only with REQUEUE_ON_FAILURE=1"),
        (SAVED + "exit 3", {"REQUEUE_ON_FAILURE": "1"}, True, "exit code 3"),
        ("exit 3", {"REQUEUE_ON_FAILURE": "1"}, False, "No checkpoint newer than 5"),
        ("touch lost; exit 3", {}, True, "A node does not answer"),
    ],
)
def test_what_becomes_of_a_job(tmp_path: Path, step: str, variables: dict[str, str], requeued: bool, said: str) -> None:
    output, _ = start(tmp_path, step, **variables).communicate(timeout=60)
    assert ("requeued 7" in output) == requeued, output
    assert said in output


def test_why_an_earlier_attempt_failed_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "FAILED").write_text("mended by now")
    output, _ = start(tmp_path, SAVED).communicate(timeout=60)
    assert "requeued 7" in output and "mended by now" not in output, output


def test_exit_codes(tmp_path: Path) -> None:
    for name, step, code in (("done", "touch run/DONE; exit 3", 0), ("stuck", "true", 1), ("failed", "exit 3", 3)):
        (tmp_path / name).mkdir()
        script = start(tmp_path / name, step)
        script.communicate(timeout=60)
        assert script.returncode == code, name


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "DONE").touch()
    script = start(tmp_path, "touch begun")
    assert "is finished. To train on" in script.communicate(timeout=60)[0]
    assert script.returncode == 0 and not (tmp_path / "begun").exists()


def test_a_request_that_an_earlier_attempt_left_behind_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    start(tmp_path, "ls run > seen").communicate(timeout=60)
    assert (tmp_path / "seen").read_text().split() == ["checkpoint-5"]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.02)


def test_the_lead_signal_becomes_a_file_and_the_step_goes_on(tmp_path: Path) -> None:
    step = "touch begun; while [[ ! -e run/STOP ]]; do sleep 0.05; done; sleep 0.3; " + SAVED
    script = start(tmp_path, step)
    wait_for(tmp_path / "begun")
    script.send_signal(signal.SIGUSR1)
    output, _ = script.communicate(timeout=60)
    assert "asked to stop" in output and "requeued 7" in output


def test_a_job_that_slurm_ends_is_not_requeued_and_waits_for_its_end(tmp_path: Path) -> None:
    script = start(tmp_path, "touch begun; sleep 0.5; " + SAVED + "touch saved")
    wait_for(tmp_path / "begun")
    script.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "saved")
    with pytest.raises(subprocess.TimeoutExpired):  # an exit of its own would read as COMPLETED
        script.wait(timeout=1.5)
    os.killpg(script.pid, signal.SIGKILL)
    assert "requeued" not in script.communicate()[0]
