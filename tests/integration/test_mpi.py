"""`launch/train.py` under Open MPI, which tells each process its rank in words of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import release
from tests.helpers_distributed import free_port
from tests.launched import ROOT, last_step, make_workshop

pytestmark = [
    release,  # at each commit the Slurm suite starts ranks by mpirun
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun (Open MPI) is not installed"),
]

# Open MPI refuses to run as root unless told twice, and to start more processes than there are cores unless allowed.
ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ALLOWED |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_btl_tcp_if_include": "lo"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def run(*command: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ALLOWED, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_trained_by_two(folder: Path) -> None:
    assert (folder / "DONE").exists() and last_step(folder) == 6
    assert {file.name for file in (folder / "heartbeat").iterdir()} == {"rank-00000.json", "rank-00001.json"}


def test_mpirun(workshop: Path) -> None:
    argv = ["launch/train.py", "--config", str(workshop / "recipe.yaml"), "--run.name", "mpirun"]
    run("mpirun", "-n", "2", sys.executable, *argv)
    assert_trained_by_two(workshop / "runs" / "mpirun")


def test_deepspeed_with_the_launcher_openmpi(workshop: Path) -> None:
    hosts = workshop / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts), "--launcher", "openmpi"]
    # with a single host the launcher would start the processes itself
    launcher += ["--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    # without this DeepSpeed tells Open MPI to use eth0
    launcher += ["--launcher_args=--mca btl_tcp_if_include lo"]
    argv = ["launch/train.py", "--config", str(workshop / "recipe.yaml"), "--run.name", "openmpi"]
    run(*launcher, *argv)
    assert_trained_by_two(workshop / "runs" / "openmpi")
