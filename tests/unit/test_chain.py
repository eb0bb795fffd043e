"""`slurm/chain.sh` with an sbatch of our own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.launched import ROOT

SBATCH = """#!/bin/bash
echo "$MAX_REQUEUES $*" >> submitted
echo "$((100 + $(wc -l < submitted)));cluster"
"""


def chain(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([ROOT / "slurm" / "chain.sh", *argv], cwd=folder, env=env, capture_output=True, text=True)


def test_every_job_waits_for_the_one_before_and_none_requeues_itself(tmp_path: Path) -> None:
    assert chain(tmp_path, "3", "--nodes", "2", "slurm/train.sbatch", "my recipe.yaml").returncode == 0
    assert (tmp_path / "submitted").read_text().splitlines() == [
        "0 --parsable --no-requeue --nodes 2 slurm/train.sbatch my recipe.yaml",
        "0 --parsable --no-requeue --dependency=afterany:101 --nodes 2 slurm/train.sbatch my recipe.yaml",
        "0 --parsable --no-requeue --dependency=afterany:102 --nodes 2 slurm/train.sbatch my recipe.yaml",
    ]


def test_a_chain_without_a_length_explains_itself(tmp_path: Path) -> None:
    done = chain(tmp_path, "slurm/train.sbatch", "recipe.yaml")
    assert done.returncode == 2 and done.stderr.startswith("usage: slurm/chain.sh NUMBER_OF_JOBS")
    assert not (tmp_path / "submitted").exists()
