"""The benchmarks for a GPU work on a machine without one as far as they can, and say so otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.forked import Program

ROOT = Path(__file__).parents[2]
PROGRAMS = {"layer": [], "step": ["--kind", "ours", "--rounds", "2"], "peft-step": ["--kind", "peft", "--rounds", "2"]}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [str(ROOT / "benchmarks" / "gpu" / f"{name.rpartition('-')[2]}.py"), *arguments]
    program = Program(argv, env=os.environ)
    said, errors = program.communicate(timeout=120)
    return subprocess.CompletedProcess(argv, program.returncode or 0, said, errors)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_prints_its_figures(name: str) -> None:
    found = run(name, "--dry-run", *PROGRAMS[name])
    assert found.returncode == 0, found.stderr[-2000:]
    assert " ms, " in found.stdout and " kernels, peak " in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["layer", "step"])
def test_without_a_gpu_they_say_so(name: str) -> None:
    found = run(name)
    assert found.returncode != 0 and "torch sees no CUDA device" in found.stderr and "Traceback" not in found.stderr
