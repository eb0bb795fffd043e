"""`slurm/sweep.sbatch`: a run for each rate, with python and srun of our own."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launched import ROOT

PYTHON = """#!/bin/bash
name=demo
while (($#)); do
    if [[ $1 == --run.name ]]; then name=$2; fi
    shift
done
echo "runs/$name"
"""
SRUN = """#!/bin/bash
printf '%q ' "$@" > called
mkdir -p runs/demo-lr3e-4
touch runs/demo-lr3e-4/DONE
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run_task(folder: Path, number: int, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One task of the array."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    env = os.environ | job | {"SLURM_ARRAY_TASK_ID": str(number), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "slurm/sweep.sbatch", *words]
    return subprocess.run(command, cwd=folder, env=env | variables, capture_output=True, text=True, timeout=60)


def test_a_task_is_a_run_of_its_own_name_and_rate(folder: Path) -> None:
    done = run_task(folder, 1, "recipe.yaml", "--deepspeed", "ds.json")
    assert done.returncode == 0, done.stderr
    words = shlex.split((folder / "called").read_text())
    of_python = words[words.index("launch/train.py") :]
    chosen = ["--optim.lr", "3e-4", "--run.name", "demo-lr3e-4"]
    assert of_python[1:] == ["--resume", "auto", "--config", "recipe.yaml", "--deepspeed", "ds.json", *chosen]
    assert "runs/demo-lr3e-4 is finished." in done.stdout


def test_the_rates_are_the_users(folder: Path) -> None:
    run_task(folder, 0, "recipe.yaml", RATES="5e-5 7e-5")
    words = shlex.split((folder / "called").read_text())
    assert words[words.index("--optim.lr") + 1] == "5e-5"


def test_a_task_without_a_rate_says_so(folder: Path) -> None:
    done = run_task(folder, 2, "recipe.yaml", RATES="5e-5 7e-5")
    assert done.returncode == 1
    assert "--array asks for rate number 2, but RATES has 2: 5e-5 7e-5." in done.stderr
    assert not (folder / "called").exists()
