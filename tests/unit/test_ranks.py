"""Launchers' variables become those that torch.distributed reads."""

from __future__ import annotations

import os

import pytest

from dsmoelora.errors import ConfigError
from dsmoelora.parallel import comm
from dsmoelora.parallel.ranks import (
    adopt_launcher_environment,
    env_local_rank,
    env_rank,
    env_world_size,
    first_host,
    tasks_on_node,
)

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_NAMES += ("DSMOELORA_LOCAL_RANK", "DSMOELORA_WORLD_SIZE_FROM", "OMPI_COMM_WORLD_LOCAL_RANK")


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables; what `adopt_launcher_environment` sets is taken back after the test."""
    for name in list(os.environ):
        if name in RANK_NAMES or name.startswith(("SLURM_", "OMPI_", "PMIX_")) or name == "ENVIRONMENT":
            monkeypatch.delenv(name)
    for name in RANK_NAMES:  # registers them for the clean-up
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def adopt(env: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    for name, value in variables.items():
        env.setenv(name, value)
    adopt_launcher_environment()
    return {name: os.environ[name] for name in RANK_NAMES if name in os.environ}


# Task 5 of 6 on the second of two nodes, as srun describes it.
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_JOB_NODELIST": "n[1-3,7],gpu05",
}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n[1-3,7],gpu05", "n1"),
        ("gpu05,n[1-3]", "gpu05"),
        ("n[07-12]", "n07"),
        ("node-a", "node-a"),
        ("rack[2,4]-n[08-09].site", "rack2-n08.site"),
        ("n3", "n3"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_an_empty_node_list_is_an_error() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_host("")


def test_tasks_per_node_are_counted_with_their_repetitions() -> None:
    assert [tasks_on_node("4(x2),3,1(x2)", node) for node in range(5)] == [4, 4, 3, 1, 1]


def test_a_plain_process_is_alone_and_takes_a_free_port(env: pytest.MonkeyPatch) -> None:
    found = adopt(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == (
        "0",
        "1",
        "0",
        "127.0.0.1",
    )
    assert 1024 <= int(found["MASTER_PORT"]) < 65536
    assert (env_rank(), env_world_size()) == (0, 1)


def test_srun_over_two_nodes(env: pytest.MonkeyPatch) -> None:
    found = adopt(env, **SRUN)
    assert (env_rank(), env_world_size()) == (5, 6)
    assert found["LOCAL_RANK"] == "2"
    assert found["LOCAL_WORLD_SIZE"] == found["LOCAL_SIZE"] == "3"
    assert found["MASTER_ADDR"] == "n1"


def test_all_tasks_of_a_step_derive_one_port_and_other_steps_another(env: pytest.MonkeyPatch) -> None:
    ports = []
    for procid, step in (("0", "0"), ("5", "0"), ("0", "1")):
        for name in RANK_NAMES:
            env.delenv(name, raising=False)
        ports.append(adopt(env, **SRUN | {"SLURM_PROCID": procid, "SLURM_STEP_ID": step})["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_a_step_on_part_of_the_job_counts_its_own_tasks_and_nodes(env: pytest.MonkeyPatch) -> None:
    step = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[3,7]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    found = adopt(env, **SRUN | step)
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("2", "n3", "1")


def test_slurm_on_one_node_needs_no_host_name(env: pytest.MonkeyPatch) -> None:
    found = adopt(env, **SRUN | {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "unresolvable"})
    assert found["MASTER_ADDR"] == "127.0.0.1"


def test_the_shell_of_a_batch_script_is_no_task(env: pytest.MonkeyPatch) -> None:
    shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert adopt(env, **shell, ENVIRONMENT="BATCH")["WORLD_SIZE"] == "1"


def test_the_three_rank_variables_of_slurm_are_enough_beside_an_address(env: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    found = adopt(env, **variables, MASTER_ADDR="10.0.0.1", MASTER_PORT="4711")
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4711")


def test_open_mpi_goes_before_slurm(env: pytest.MonkeyPatch) -> None:
    """`mpirun` in a batch job starts its daemons with srun: their Slurm rank is inherited, and means something else."""
    mpi = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "PMIX_NAMESPACE": "run.1",
    }
    found = adopt(env, **SRUN, **mpi)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == (
        "3",
        "4",
        "3",
        "127.0.0.1",
    )


def test_torchruns_variables_stay_as_they_are(env: pytest.MonkeyPatch) -> None:
    given = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    given |= {"MASTER_ADDR": "n9", "MASTER_PORT": "29501"}
    assert adopt(env, **SRUN, **given) == given | {"LOCAL_SIZE": "2"}


def test_half_a_set_of_variables_names_what_is_missing(env: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"RANK=1 but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        adopt(env, RANK="1")


class FakeAccelerator:
    """So many devices of a kind that this machine lacks; `device` is the one that was chosen."""

    def __init__(self, num_devices: int) -> None:
        self.num_devices, self.device = num_devices, None

    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return self.num_devices

    def set_device(self, index: int) -> None:
        self.device = index


@pytest.mark.parametrize(("num_devices", "device"), [(1, 0), (2, 1)])
def test_a_task_that_is_shown_its_own_device_alone_uses_it(
    env: pytest.MonkeyPatch, num_devices: int, device: int
) -> None:
    """DeepSpeed reads these variables itself; the true local rank stays known, also when asked to twice."""
    accelerator = FakeAccelerator(num_devices)
    env.setattr(comm, "get_accelerator", lambda: accelerator)
    env.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    env.setenv("LOCAL_RANK", "1")
    for _ in range(2):
        comm._use_own_device()
        assert accelerator.device == device
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(device)
        assert env_local_rank() == 1
