"""Who am I among the processes: every launcher's variables turned into those that torch.distributed reads.

`torchrun` and `deepspeed` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT themselves. `srun` and
`mpirun` say the same in words of their own, and a plain `python` process says nothing.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import MutableMapping

from dsmoelora.errors import ConfigError

# The launcher's word for which process of the node this is, kept where LOCAL_RANK has to name the device.
_TRUE_LOCAL_RANK = "DSMOELORA_LOCAL_RANK"
_SOURCE = "DSMOELORA_WORLD_SIZE_FROM"
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Below the ephemeral ports of Linux (32768 and up), so that no outgoing connection sits on the port we derive.
_FIRST_PORT, _NUM_PORTS = 15000, 15000


def env_rank() -> int:
    """This process's rank by the environment, before torch.distributed is up; 0 for a plain process."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    """Number of ranks by the environment, before torch.distributed is up; 1 for a plain process."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def source_of_world_size() -> str:
    """The variable that says how many ranks there are: the launcher's own."""
    return os.environ.get(_SOURCE, "WORLD_SIZE")


def env_local_rank() -> int:
    """Which process of its node this is, by the launcher, whatever the number of its device; 0 for a plain process."""
    return int(os.environ.get(_TRUE_LOCAL_RANK, os.environ.get("LOCAL_RANK", "0")))


def call_device_0() -> None:
    """Make 0 of the local rank of a process that is shown one device alone; `env_local_rank` still tells the true one.

    DeepSpeed takes LOCAL_RANK for the number of the device (`partition_parameters.py`, `comm/torch.py`), and wants
    Open MPI's variable to agree (`engine.py`). Under `--gpus-per-task=1` every task sees its own device as number 0.
    """
    os.environ[_TRUE_LOCAL_RANK] = str(env_local_rank())
    os.environ["LOCAL_RANK"] = "0"
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"


def on_first_node() -> bool:
    """Whether this process shares rank 0's machine, as far as the launcher tells."""
    return env_rank() < int(os.environ.get("LOCAL_WORLD_SIZE", env_world_size()))


def adopt_launcher_environment() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what the launcher gave.

    What is set already stays. Open MPI is asked before Slurm, because `mpirun` inside a batch job starts its daemons
    with `srun`: their Slurm rank is not the process's rank.

    Raises:
        ConfigError: the launcher's variables are incomplete
    """
    env = os.environ
    if "RANK" not in env:
        if "OMPI_COMM_WORLD_RANK" in env:
            found = _from_open_mpi(env) | {_SOURCE: "OMPI_COMM_WORLD_SIZE"}
        elif _is_srun_task(env):
            name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
            found = _from_slurm(env) | {_SOURCE: name}
        else:
            found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        # The rank triple belongs together and is taken whole; an address chosen by the user wins over a derived one.
        for name, value in found.items():
            env[name] = env.get(name, value) if name.startswith("MASTER_") else value
    missing = [name for name in _NEEDED if name not in env]
    if missing:
        raise ConfigError(
            f"The environment sets RANK={env['RANK']} but not {', '.join(missing)}. "
            "Start with `deepspeed`, `torchrun`, `srun` or `mpirun`, or unset RANK for a single process."
        )
    # deepspeed's launcher and torchrun have different names for the processes of one node; both are read further on.
    local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
    if local_size:
        env["LOCAL_WORLD_SIZE"] = env["LOCAL_SIZE"] = local_size


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `n[1-3,7],gpu05` -> `n1`, `rack[02-03]-n[08-09]` -> `rack02-n08`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list.strip())
    if first is None:
        raise ConfigError(f"The Slurm node list {node_list!r} names no host. Set MASTER_ADDR to the first node.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks of node number `node` in Slurm's form `4(x2),3`: 4 on nodes 0 and 1, 3 on node 2."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(repeat or 1)
    return counts[node]


def _is_srun_task(env: MutableMapping[str, str]) -> bool:
    """Whether `srun` started this process. A batch script's own shell has SLURM_PROCID=0 as well, but no step."""
    if "SLURM_PROCID" not in env or "SLURM_NTASKS" not in env:
        return False
    return "SLURM_STEP_ID" in env or env.get("ENVIRONMENT") != "BATCH"


def _from_slurm(env: MutableMapping[str, str]) -> dict[str, str]:
    """The variables of an `srun` task. A step may use fewer nodes and tasks than its job: the step's word counts."""
    num_tasks = env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": num_tasks, "LOCAL_RANK": env.get("SLURM_LOCALID", "0")}
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE"))
    if per_node:
        found["LOCAL_WORLD_SIZE"] = str(tasks_on_node(per_node, int(env.get("SLURM_NODEID", "0"))))
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST")))
    one_node = "1" in (num_tasks, env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")))
    if one_node or nodes:
        found["MASTER_ADDR"] = "127.0.0.1" if one_node else first_host(nodes or "")
    # Two steps of one job, or two jobs on one node, must not meet on one port.
    found["MASTER_PORT"] = _derived_port(f"slurm {env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_STEP_ID', '0')}")
    return found


def _from_open_mpi(env: MutableMapping[str, str]) -> dict[str, str]:
    """The variables of a process under Open MPI's `mpirun`."""
    size, local_size = env["OMPI_COMM_WORLD_SIZE"], env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    found = {
        "RANK": env["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        "LOCAL_WORLD_SIZE": local_size,
    }
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return found
    if local_size == size:
        # All ranks are children of one mpirun, which is what makes this name the same for all and new for each run.
        run = env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", str(os.getppid())))
        return found | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _derived_port(f"mpi {run}")}
    return found | _agree_over_mpi()


def _agree_over_mpi() -> dict[str, str]:
    """Rank 0's host name and a free port there, sent round by MPI itself: `mpirun` names no host."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpirun over several nodes: nobody says where rank 0 is. Install mpi4py "
            "(`pip install dsmoelora[mpi]`), or pass `-x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500`."
        ) from error
    return MPI.COMM_WORLD.bcast({"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(_free_port())}, root=0)


def _derived_port(name: str) -> str:
    return str(_FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
