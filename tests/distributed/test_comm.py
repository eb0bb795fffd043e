"""The collectives, on two and three real processes, and alone."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import DistNetworkError

from dsmoelora.errors import UserError
from dsmoelora.parallel import comm
from dsmoelora.parallel.meeting import listen
from dsmoelora.parallel.ranks import env_rank
from dsmoelora.signs_of_life import waits
from tests.conftest import PoolFactory
from tests.helpers_distributed import run_distributed
from tests.host_waits import HostWaits


def exchange() -> dict[str, Any]:
    rank = comm.rank()
    comm.barrier()
    return {
        "rank": rank,
        "world_size": comm.world_size(),
        "sum": comm.all_reduce_sum([1.0, float(rank)]),
        "any of none": comm.any_rank(False),
        "any of the last": comm.any_rank(rank == comm.world_size() - 1),
        "gathered": comm.gather_objects({"rank": rank, "text": "ä" * rank * 10}),
        "nothing gathered": comm.gather_objects(None),
        "gathered by all": comm.all_gather_objects((rank, "ä" * rank * 10)),
        "broadcast": comm.broadcast_object({"from": rank, "list": [1, "ü", None, 0.1]}),
    }


def gather_and_listen() -> tuple[list[float], list[str]]:
    """What all ranks gave, and what torch said of how it was called; DeepSpeed's own call among it."""
    comm.init()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own = torch.tensor([float(comm.rank())])
        everyone = comm.all_gather_tensor(own, None)
        share = torch.empty(1)
        comm.dist.reduce_scatter_fn(share, everyone)
    return [*everyone.tolist(), share.item()], [str(each.message) for each in said]


def test_no_collective_is_called_by_a_name_that_goes_away() -> None:
    first, second = run_distributed(gather_and_listen, 2, join_group=False)
    assert first == ([0.0, 1.0, 0.0], []) and second == ([0.0, 1.0, 2.0], [])


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_what_it_should(worker_pool: PoolFactory, world_size: int) -> None:
    for rank, found in enumerate(worker_pool(world_size).run(exchange)):
        everyone = [{"rank": k, "text": "ä" * k * 10} for k in range(world_size)]
        assert found == {
            "rank": rank,
            "world_size": world_size,
            "sum": [float(world_size), world_size * (world_size - 1) / 2],
            "any of none": False,
            "any of the last": True,
            "gathered": everyone if rank == 0 else None,
            "nothing gathered": [None] * world_size if rank == 0 else None,
            "gathered by all": [[k, "ä" * k * 10] for k in range(world_size)],
            "broadcast": {"from": 0, "list": [1, "ü", None, 0.1]},
        }


def reads_of_a_gather() -> tuple[int, int]:
    """Numbers that the host reads one by one, and numbers that are made of Python's, in one gather of bytes."""
    with HostWaits() as waits:
        assert comm.all_gather_objects("x" * 100 * comm.rank()) == ["x" * 100 * k for k in range(comm.world_size())]
    return waits.num_reads, waits.num_made


def test_a_gather_reads_no_number_by_itself(worker_pool: PoolFactory) -> None:
    """The lengths come in one list; the bytes are taken as they lie in memory, all but the length of one's own."""
    assert worker_pool(3).run(reads_of_a_gather) == [(0, 1)] * 3


def sum_needs_float64() -> list[float]:
    return comm.all_reduce_sum([1.0 + 2.0**-40])


def test_sums_are_float64(worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(sum_needs_float64) == [[2.0 + 2.0**-39]] * 2


def fail_on(ranks: list[int]) -> tuple[str, str]:
    def work() -> int:
        if comm.rank() in ranks:
            raise OSError(f"disk of rank {comm.rank()} is full")
        return comm.rank()

    try:
        return "returned", str(comm.together(work))
    except (OSError, UserError) as error:
        return type(error).__name__, str(error)


def test_together_fails_everywhere_when_it_fails_somewhere(worker_pool: PoolFactory) -> None:
    assert worker_pool(3).run(fail_on, []) == [("returned", "0"), ("returned", "1"), ("returned", "2")]
    others = ("UserError", "rank 1: disk of rank 1 is full")
    assert worker_pool(3).run(fail_on, [1]) == [others, ("OSError", "disk of rank 1 is full"), others]
    assert worker_pool(3).run(fail_on, [1, 2])[0] == others


def fail_without_words() -> str:
    def work() -> None:
        if comm.rank() == 1:
            raise RuntimeError

    try:
        comm.together(work)
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__} {error}"
    return "returned"


def test_together_notices_an_error_without_a_message(worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(fail_without_words) == ["UserError rank 1: RuntimeError", "RuntimeError "]


def test_a_single_process_needs_no_process_group() -> None:
    assert (comm.rank(), comm.world_size()) == (0, 1)
    assert comm.all_reduce_sum([1.5]) == [1.5]
    assert comm.gather_objects([1]) == [[1]]
    assert comm.all_gather_objects([1]) == [[1]]
    assert comm.broadcast_object({"a": 1}) == {"a": 1}
    assert comm.any_rank(True)
    assert comm.together(lambda: "done") == "done"
    with pytest.raises(KeyError):
        comm.together(lambda: {}["missing"])


class FakeAccelerator:
    """One with streams, on the CPU."""

    num_streams = 0

    def device_name(self) -> str:
        return "fake"

    def current_device_name(self) -> str:
        return "cpu"

    def Stream(self) -> object:  # as accelerators call it
        self.num_streams += 1
        return object()

    def stream(self, _: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_answers_that_nobody_waits_for_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run asks in every forward pass."""
    accelerator = FakeAccelerator()
    monkeypatch.setattr(comm, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    monkeypatch.setattr(comm.dist, "all_reduce", lambda *_, **__: mock.Mock())
    comm._stream_beside.cache_clear()
    try:
        answers = [comm.start_any_rank(flag) for flag in (True, False, True)]
        assert [answer() for answer in answers] == [True, False, True]
        assert accelerator.num_streams == 1
    finally:
        comm._stream_beside.cache_clear()


def wait_for_a_late_rank() -> tuple[bool, float]:
    import time

    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1])
    comm._TIMEOUT_MARGIN_S = 0.0
    comm.set_timeout(1.5)
    if comm.rank() == 1:
        time.sleep(6)
        return True, 0.0
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return comm.is_lost_contact(error), time.monotonic() - begin
    return False, 0.0


def test_every_group_gets_the_timeout_of_the_watchdog() -> None:
    (is_lost, seconds), _ = run_distributed(wait_for_a_late_rank, 2)
    assert is_lost and 1 < seconds < 5


def init_and_sum() -> tuple[float, bool]:
    comm.init()
    return comm.all_reduce_sum([1.0])[0], hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_nothing_is_compiled_for_cpu_ranks(tmp_path: Path) -> None:
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert run_distributed(init_and_sum, 2, join_group=False, env=env) == [(2.0, False)] * 2
    assert not list(tmp_path.iterdir())


def init_alone(late_rank: int, who: str, has_spoken: Path) -> list[str]:
    """What a rank says while another one is late: until somebody has said that it is."""
    waits.FIRST_WORD_S = 0.5
    deadline = time.monotonic() + 60
    while env_rank() == late_rank and not has_spoken.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    said: list[str] = []

    def hear(record: logging.LogRecord) -> None:
        said.append(record.getMessage())
        if f"Waiting for {who} at 127.0.0.1:" in said[-1]:
            has_spoken.touch()

    handler = logging.Handler()
    handler.emit = hear  # type: ignore[method-assign]
    logging.getLogger("dsmoelora").addHandler(handler)
    comm.init()
    return said


@pytest.mark.parametrize(("late_rank", "speaker", "who"), [(2, 0, "1 of 3 ranks"), (0, 1, "the other 2 of 3 ranks")])
def test_ranks_that_do_not_come_are_counted(late_rank: int, speaker: int, who: str, tmp_path: Path) -> None:
    has_spoken = tmp_path / "has spoken"
    said = run_distributed(init_alone, 3, late_rank, who, has_spoken, join_group=False)
    assert has_spoken.exists()
    assert any(
        f"Waiting for {who} at" in each and "(their number is from WORLD_SIZE), since " in each
        for each in said[speaker]
    )
    assert not said[2]


def init_and_list_listeners() -> list[str]:
    import psutil

    comm.init()
    assert comm.all_reduce_sum([1.0]) == [2.0]
    listeners = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return [connection.laddr.ip for connection in listeners]


def test_ranks_listen_on_the_interface_that_connects_them_alone() -> None:
    """`GLOO_SOCKET_IFNAME` is lo and `MASTER_ADDR` 127.0.0.1 here."""
    listeners = run_distributed(init_and_list_listeners, 2, join_group=False)
    assert all(listeners) and {ip for each in listeners for ip in each} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("resolved", "num_nodes", "expected"),
    [
        ("127.0.0.1", 1, "127.0.0.1"),
        ("127.0.1.1", 2, None),  # Debian's /etc/hosts: other nodes could not reach it
        ("192.0.2.1", 2, None),  # not an address of this machine
    ],
)
def test_where_rank_0_listens(
    monkeypatch: pytest.MonkeyPatch, resolved: str, num_nodes: int, expected: str | None
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", (resolved, 0))])
    monkeypatch.setenv("WORLD_SIZE", str(2 * num_nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    listener = listen("node", 0)
    assert (listener and listener.getsockname()[0]) == expected
    if listener:
        listener.close()


def test_a_port_that_is_taken_is_an_error_and_not_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DistNetworkError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            listen("127.0.0.1", port)
