"""The collectives, on two and three real processes, and alone."""

from __future__ import annotations

from typing import Any

import pytest

from dsmoelora.errors import UserError
from dsmoelora.parallel import comm
from tests.conftest import PoolFactory
from tests.helpers_distributed import run_distributed


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
        "broadcast": comm.broadcast_object({"from": rank, "list": [1, "ü", None, 0.1]}),
    }


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
            "broadcast": {"from": 0, "list": [1, "ü", None, 0.1]},
        }


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
    assert comm.broadcast_object({"a": 1}) == {"a": 1}
    assert comm.any_rank(True)
    assert comm.together(lambda: "done") == "done"
    with pytest.raises(KeyError):
        comm.together(lambda: {}["missing"])


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
