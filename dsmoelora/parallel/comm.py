"""Collectives in the few forms that the rest needs, over `deepspeed.comm` so that its logger counts them.

Everything here works with one process too, initialised or not. Tensors travel on the accelerator's device: gloo
takes CPU tensors, NCCL device tensors only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from dsmoelora.errors import ConfigError, UserError
from dsmoelora.parallel.meeting import meet
from dsmoelora.parallel.ranks import call_device_0, env_rank, env_world_size

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_TIMEOUT_MARGIN_S = _SHUTDOWN_TIMEOUT_S = 60.0
_LOST_CONTACT = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "application timeout",
    "remote process exited",
    "nccl communicator was aborted",
    "heartbeat monitor timed out",
)


def init(backend: str | None = None) -> None:
    """Join the process group that the environment describes (see `ranks.adopt_launcher_environment`).

    Args:
        backend: of torch.distributed; None for the accelerator's own

    Raises:
        ConfigError: the address is taken or cannot be reached, or not all ranks came in time
    """
    if dist.is_initialized():
        return
    backend = backend or get_accelerator().communication_backend_name()
    _use_own_device()
    try:
        with _without_cpu_operator():
            meet(_device(), backend)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        _use_new_names()
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"The ranks cannot meet at MASTER_ADDR:MASTER_PORT = {where}: {str(error).splitlines()[0]}. "
            "Choose a free port (`deepspeed --master_port N`, `torchrun --master-port N`), check the address, and see "
            "whether every rank was started."
        ) from error


def shutdown() -> None:
    """Leave the process group; without it gloo's threads abort the interpreter on its way out.

    Where a rank is gone this may wait for it: after a minute the process ends anyway, with code 1.
    """
    if dist.is_initialized():
        faulthandler.dump_traceback_later(_SHUTDOWN_TIMEOUT_S, exit=True)
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def set_timeout(hang_timeout_s: float) -> None:
    """Give every process group of now the time that a watchdog allows, and a minute more, so that it speaks first.

    Left alone, DeepSpeed's group fails after 10 minutes and NCCL's others too, however long rank 0 may still have to
    tokenise or save.
    """
    if not dist.is_initialized():
        return
    timeout = timedelta(seconds=hang_timeout_s + _TIMEOUT_MARGIN_S)
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because a peer is gone or did not answer, by the words of gloo and NCCL."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST_CONTACT)


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else env_rank()


def world_size() -> int:
    """Number of ranks."""
    if dist.is_initialized():
        return dist.get_world_size()
    assert env_world_size() == 1, "comm.init() was not called"
    return 1


def barrier() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sums over ranks, number by number, in float64; the same on all ranks."""
    if world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather_numbers(own: torch.Tensor) -> list[list[float]]:
    """Every rank's (n,) tensor on the host, in the order of ranks, the same on all: one collective, one read.

    Args:
        own: on any device
    """
    if world_size() == 1:
        return [own.tolist()]
    return all_gather_tensor(own.to(_device()), None).view(world_size(), -1).tolist()


def all_gather_tensor(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """(n, ...) of every rank of a process group, None for that of all -> (P n, ...), in the order of ranks."""
    own = tensor.contiguous()
    everyone = own.new_empty(dist.get_world_size(group=group) * own.shape[0], *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own, group=group)
    return everyone


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a tensor on the accelerator, in place; nothing comes to the host."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_tensor(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The numbers of one rank on every rank, in place; a contiguous tensor on any device."""
    if world_size() > 1:
        on_device = tensor.to(_device())  # NCCL takes no others
        dist.broadcast(on_device, src=source)
        if on_device is not tensor:
            tensor.copy_(on_device)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same on all ranks."""
    return all_reduce_sum([float(flag)])[0] > 0


def start_any_rank(flag: bool) -> Callable[[], bool]:
    """Begin to ask what `any_rank` asks; the function that comes back waits for the answer and gives it."""
    if world_size() == 1:
        return lambda: flag

    def on_stream() -> Any:
        beside = _stream_beside()
        return contextlib.nullcontext() if beside is None else get_accelerator().stream(beside)

    with on_stream():
        tensor = torch.full((1,), float(flag), device=_device())
        handle = dist.all_reduce(tensor, async_op=True)

    def finish() -> bool:
        with on_stream():
            handle.wait()
            return bool(tensor.item() > 0)

    return finish


@functools.cache
def _stream_beside() -> Any:
    """This process's stream for answers that are read without waiting for what the accelerator has to compute."""
    return None if get_accelerator().device_name() == "cpu" else get_accelerator().Stream()


def gather_objects(obj: Any) -> list[Any] | None:
    """Every rank's JSON-able object, in the order of ranks, on rank 0; None elsewhere."""
    everyone = _all_gather_bytes(json.dumps(obj).encode())
    return [json.loads(text) for text in everyone] if rank() == 0 else None


def all_gather_objects(obj: Any) -> list[Any]:
    """Every rank's JSON-able object, in the order of ranks, on every rank. Tuples come back as lists."""
    return [json.loads(text) for text in _all_gather_bytes(json.dumps(obj).encode())]


def broadcast_object(obj: Any) -> Any:
    """Rank 0's JSON-able object on every rank; what the others pass is ignored. Tuples come back as lists."""
    text = json.dumps(obj).encode() if rank() == 0 else b""
    if world_size() == 1:
        return json.loads(text)
    length = torch.tensor([len(text)], dtype=torch.int64, device=_device())
    dist.broadcast(length, src=0)
    data = torch.empty(int(length), dtype=torch.uint8, device=_device())
    if rank() == 0:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.cpu().numpy()))


def together(fn: Callable[[], Result]) -> Result:
    """Run `fn` on every rank and fail on all of them when it fails on one: nobody waits for a rank that is gone.

    For work that may go wrong on a rank alone (a disk, a file, memory). `fn` must not contain collectives.

    Raises:
        Exception: on a rank where `fn` raised, its own error
        UserError: on the others, naming the first rank that failed and its message
    """
    own: Exception | None = None
    result: Any = None
    try:
        result = fn()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        own = error
    message = "" if own is None else (str(own) or type(own).__name__)
    if any_rank(own is not None):
        messages = _all_gather_bytes(message.encode())
        if own is not None:
            raise own
        failed = next(k for k, text in enumerate(messages) if text)
        raise UserError(f"rank {failed}: {messages[failed].decode()}")
    return result


def _all_gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's bytes, in the order of ranks."""
    if world_size() == 1:
        return [data]
    own_length = torch.tensor([len(data)], dtype=torch.int64, device=_device())
    lengths = all_gather_tensor(own_length, None).tolist()
    longest = max(1, *lengths)  # collectives need tensors of one size, and not an empty one
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(_device())
    everyone = all_gather_tensor(padded, None).view(-1, longest).cpu().numpy()
    return [one[:length].tobytes() for one, length in zip(everyone, lengths, strict=True)]


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _use_new_names() -> None:
    """Have DeepSpeed's backend call two collectives as torch 2.13 does, where the old names warn of their end.

    Our calls and DeepSpeed's own go through it, logged under the old names; torch 2.12 has no others.
    """
    for attribute, name in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):
        if hasattr(torch.distributed, name) and hasattr(dist.comm.cdb, attribute):
            setattr(dist.comm.cdb, attribute, getattr(torch.distributed, name))


def _use_own_device() -> None:
    """Bind this process to its accelerator, before anything allocates on device 0, or to its share of the cores."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.utils.nvtx.enable_nvtx = False  # ranges that nothing records take a twelfth of a small step
        # deepspeed's launcher leaves every rank a thread for each core of the machine, and they would all wait for all
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return
    if accelerator.device_count() == 1:
        call_device_0()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def _without_cpu_operator() -> Iterator[None]:
    """Keep DeepSpeed from compiling an operator for CPU ranks when it initialises, a minute's work.

    Only its inference sums with it, and every rank with it takes 66 MiB of /dev/shm, more than all that a container has
    by default, and leaves them behind.
    """
    backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` is torch
    build, backend.build_shm_op = backend.build_shm_op, lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        backend.build_shm_op = build  # type: ignore[attr-defined]
