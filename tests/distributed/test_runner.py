"""The runner of the distributed tests: what comes back, and what is said when a rank raises, dies or hangs."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolFactory
from tests.helpers_distributed import DistributedFailure, WorkerPool, run_distributed


def scaled_rank_and_sum(scale: float) -> tuple[float, float]:
    total = torch.tensor(scale * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return scale * dist.get_rank(), total.item()


def weights_of_a_rank() -> torch.Tensor:
    return torch.full((2, 3), float(dist.get_rank()))


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only rank one minds")
    dist.barrier()  # rank 0 waits for a rank that never comes


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        print("rank zero is going to sleep", flush=True)
        oversleep()


def oversleep() -> None:
    time.sleep(600)


def process_id() -> int:
    return os.getpid()


def variables(names: list[str]) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def imported() -> list[str]:
    return [name for name in ("torch", "deepspeed", "transformers", "dsmoelora.trainer") if name in sys.modules]


def test_a_new_worker_has_everything_imported() -> None:
    """Otherwise each would take seconds of a core for it, and nobody would notice."""
    (names,) = run_distributed(imported, 1, join_group=False)
    assert names == ["torch", "deepspeed", "transformers", "dsmoelora.trainer"]


def test_results_come_back_by_rank(worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(scaled_rank_and_sum, 10.0) == [(0.0, 30.0), (10.0, 30.0)]
    assert [weights.tolist() for weights in worker_pool(2).run(weights_of_a_rank)] == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]


def test_workers_stay_for_the_next_call(worker_pool: PoolFactory) -> None:
    first = worker_pool(2).run(process_id)
    assert worker_pool(2).run(process_id) == first
    assert len(set(first)) == 2
    assert os.getpid() not in first


def test_error_of_one_rank_is_reported_with_its_traceback_and_the_pool_recovers(worker_pool: PoolFactory) -> None:
    started = time.monotonic()
    with pytest.raises(DistributedFailure) as caught:
        worker_pool(2).run(raise_on_rank_one)
    assert time.monotonic() - started < 20, "the rank that waits must not be waited for"
    report = str(caught.value)
    assert "ValueError: only rank one minds" in report
    assert "in raise_on_rank_one" in report
    assert "rank 0: still running, killed" in report
    assert worker_pool(2).run(scaled_rank_and_sum, 1.0) == [(0.0, 3.0), (1.0, 3.0)]


def test_death_of_one_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(DistributedFailure, match=r"rank 1: died with exit code 7"):
        run_distributed(die_on_rank_one, 2)


def test_hang_fails_in_time_with_the_stack_and_leaves_no_process() -> None:
    pool = WorkerPool(2)
    pids = pool.run(process_id)
    started = time.monotonic()
    with pytest.raises(DistributedFailure, match="took more than 2 s") as caught:
        pool.run(hang_on_rank_zero, timeout_s=2)
    assert time.monotonic() - started < 10
    report = str(caught.value)
    assert "rank zero is going to sleep" in report
    assert "in oversleep" in report
    assert "rank 1: done" in report
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_have_the_variables_of_a_launcher_and_those_asked_for() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "CHOSEN"]
    (found,) = run_distributed(variables, 1, names, env={"CHOSEN": "yes"}, join_group=False)
    assert found == ["0", "1", "0", "1", "yes"]


def test_function_that_workers_cannot_import_is_refused(worker_pool: PoolFactory) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"(?i)local|pickle"):
        worker_pool(1).run(lambda: None)
