"""How the ranks find each other: torch's group of all ranks, over a store that listens where it must and no further."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time

import torch
from deepspeed.constants import default_pg_timeout
from torch.distributed import DistNetworkError, DistStoreError, Store, TCPStore  # type: ignore[attr-defined]

from dsmoelora.parallel.ranks import env_rank, env_world_size, source_of_world_size
from dsmoelora.signs_of_life.waits import waiting_for

_ARRIVED = "dsmoelora/arrived"
_LOOK_EVERY_S = 0.02
_arrived: list[int] = []  # the last count of them


def meet(device: torch.device, backend: str) -> None:
    """Form torch's group of all ranks, which DeepSpeed then takes as its own.

    Not left to DeepSpeed: torch's own store listens on all interfaces of rank 0's node.

    Args:
        device: of this rank
        backend: of the group

    Raises:
        DistNetworkError: the address is taken or cannot be reached
        DistStoreError: not all ranks came in time
    """
    # rank 0 counts who has come, rank 1 says that rank 0 has not
    with waiting_for(_absent, speaks=env_rank() < 2 and env_world_size() > 1):
        _meet(device, backend)


def _meet(device: torch.device, backend: str) -> None:
    store = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else _own_store()  # torchrun serves one
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=-1 if store is None else env_rank(),
        world_size=-1 if store is None else env_world_size(),
        timeout=default_pg_timeout,
        device_id=device if backend == "nccl" and env_world_size() > 1 else None,
    )


def _absent() -> str:
    num_ranks, where = env_world_size(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if env_rank() or not _arrived:
        who = f"the other {num_ranks - 1} of {num_ranks} ranks"
    else:
        who = f"{num_ranks - _arrived[-1]} of {num_ranks} ranks"
    return f"{who} at {where} (their number is from {source_of_world_size()})"


def _own_store() -> Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, once all ranks are there; rank 0 serves it."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = listen(where, port) if env_rank() == 0 else None
    store = TCPStore(
        where,
        port,
        env_world_size(),
        is_master=env_rank() == 0,
        timeout=default_pg_timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    deadline = time.monotonic() + default_pg_timeout.total_seconds()
    _arrived[:] = [store.add(_ARRIVED, 1)]
    while _arrived[-1] < env_world_size():
        if time.monotonic() > deadline:
            raise DistStoreError(f"{_arrived[-1]} of {env_world_size()} ranks came in {default_pg_timeout}")
        time.sleep(_LOOK_EVERY_S)
        _arrived[:] = [store.add(_ARRIVED, 0)]
    return store


def listen(where: str, port: int) -> socket.socket | None:
    """A socket on the interface of MASTER_ADDR alone; None where that cannot be told, and torch listens on all.

    Raises:
        DistNetworkError: the port is taken
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(where, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None
    host = str(address[0])
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if ipaddress.ip_address(host.split("%")[0]).is_loopback and not one_node:
        return None  # Debian gives a node's own name a loopback address; other nodes know it by another
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # the address of a gateway or a service in front of this node
            return None
        raise DistNetworkError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}") from error
