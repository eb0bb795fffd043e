"""Runs a function on several gloo processes of this machine and brings back what each of them returned.

    def sum_of_ranks(scale: int) -> float:                   # a top-level function: workers import it by name
        return comm.all_reduce_sum([float(comm.rank() * scale)])[0]

    assert run_distributed(sum_of_ranks, 2, 10) == [10.0, 10.0]                 # new processes, about a second
    assert worker_pool(2).run(sum_of_ranks, 10) == [10.0, 10.0]                 # those of the session, a few ms

Workers are forked from one process that has imported torch and deepspeed (`forks`), and join one process group once,
which is why a pool lives as long as the test session. What a function leaves behind in its process stays there for the
next one: give models a seed, and use `run_distributed` for what changes the process itself (environment, process group,
signals).

A call ends in one of four ways: every rank returns; a rank raises; a rank dies; time is up. In the last three all
workers are killed, the next call gets new ones, and `DistributedFailure` carries the traceback or the stacks of every
rank together with the end of what it printed. Nothing outlives its session: workers end with their parent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0  # importing torch and deepspeed in all workers, on a busy machine
# Among them what deepspeed.initialize imports when it is first called.
_PRELOADED = ("pytest", "dsmoelora.trainer", "dsmoelora.cli", "dsmoelora.plan", "torch._inductor.compile_fx")
GRACE_S = 3.0  # after a rank has failed, how long the others may take to say what happened to them
LOG_TAIL_CHARS = 6000


class DistributedFailure(AssertionError):
    """A call failed; the message has a section for every rank."""


class WorkerPool:
    """`world_size` processes that form one gloo group and run one function after the other.

    Args:
        world_size: number of processes
        env: variables of the workers beside those that the pool sets
        join_group: whether the workers initialise DeepSpeed's process group themselves
        forked: see `forks`; a worker whose `env` is read while importing (DS_ACCELERATOR) must be spawned
    """

    def __init__(
        self, world_size: int, env: dict[str, str] | None = None, join_group: bool = True, forked: bool = True
    ) -> None:
        self.world_size = world_size
        self._env = env or {}
        self._join_group, self._forked = join_group, forked
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call `fn(*args)` on every rank; the results in the order of ranks.

        Args:
            fn: a top-level function of an importable module
            args: the same for every rank; must pickle
            timeout_s: seconds after which the call has failed; starting the workers does not count

        Raises:
            DistributedFailure: a rank raised, died, or was not done in time
        """
        call = pickle.dumps((fn, args))
        if not self._workers:
            self._start()
        return self._call(pickle.dumps((sys.path, call)), timeout_s)  # in two layers: the path is needed to load fn

    def close(self) -> None:
        """Kill the workers. Another `run` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        address |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(self.world_size))
        for rank in range(self.world_size):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = Path(self._folder.name) / f"rank{rank}.log"
            self._workers.append(_Worker.start(log, address | ranks | self._env, self._join_group, self._forked))
        self._collect(START_TIMEOUT_S, "starting the workers")

    def _call(self, message: bytes, timeout_s: float) -> list[Any]:
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # a worker that has died is reported by _collect
                worker.connection.send_bytes(message)
        return self._collect(timeout_s, "the call")

    def _collect(self, timeout_s: float, what: str) -> list[Any]:
        """Wait for an answer of every worker; on failure say what happened to each, and kill all."""
        deadline = time.monotonic() + timeout_s
        outcomes: dict[int, _Outcome] = {}
        while len(outcomes) < self.world_size:
            open_ranks = [rank for rank in range(self.world_size) if rank not in outcomes]
            handles: list[Any] = [self._workers[rank].connection for rank in open_ranks]
            handles += [self._workers[rank].process.sentinel for rank in open_ranks]
            ready = wait(handles, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in open_ranks:
                worker = self._workers[rank]
                if worker.connection in ready or worker.process.sentinel in ready:
                    outcomes[rank] = worker.outcome()
                    if outcomes[rank].error is not None:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(outcomes) == self.world_size and all(outcome.error is None for outcome in outcomes.values()):
            return [outcomes[rank].result for rank in range(self.world_size)]
        timed_out = all(outcome.error is None for outcome in outcomes.values())
        report = self._report(outcomes)
        self.close()
        headline = f"{what} took more than {timeout_s:g} s" if timed_out else f"{what} failed"
        raise DistributedFailure(f"{headline}, world size {self.world_size}\n{report}")

    def _report(self, outcomes: dict[int, _Outcome]) -> str:
        missing = [rank for rank in range(self.world_size) if rank not in outcomes]
        for rank in missing:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].pid, signal.SIGQUIT)  # prints the stacks to the worker's log
        if missing:
            time.sleep(1.0)
        sections = []
        for rank, worker in enumerate(self._workers):
            outcome = outcomes.get(rank)
            if outcome is None:
                state = "still running, killed; its stacks are at the end of its output"
            else:
                state = outcome.error or "done"
            sections.append(f"--- rank {rank}: {state}\n{worker.log_tail() if state != 'done' else ''}")
        return "\n".join(sections)


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    env: dict[str, str] | None = None,
    join_group: bool = True,
) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes; the results in the order of ranks. See `WorkerPool`."""
    pool = WorkerPool(world_size, env, join_group)
    try:
        return pool.run(fn, *args, timeout_s=timeout_s)
    finally:
        pool.close()


def forks() -> ForkServerContext:
    """Starts processes that have torch, deepspeed and this package imported, in a hundredth of the time that takes.

    They are forked from a server that has done nothing but import: none of torch's threads run in it, and it has no
    process group. Variables that are read while importing (OMP_NUM_THREADS, DS_ACCELERATOR, HF_HOME) are those of the
    session, whatever a worker is given.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, __name__, "tests.frozen"])
    return context


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def base_environment() -> dict[str, str]:
    """What every process of a test runs with: CPU ranks with one thread each, talking over the loopback interface."""
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclass(frozen=True)
class _Outcome:
    """What became of one rank's call: a result, or the text of an error."""

    result: Any = None
    error: str | None = None


@dataclass(frozen=True)
class _Worker:
    """The parent's end of one worker process."""

    process: BaseProcess
    connection: Connection
    log: Path

    @classmethod
    def start(cls, log: Path, env: dict[str, str], join_group: bool, forked: bool) -> _Worker:
        context = forks() if forked else multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = (theirs, base_environment() | env, str(log), join_group)
        process = context.Process(target=_worker_main, args=args, daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours, log)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None, "the process was started in `start`"
        return self.process.pid

    def outcome(self) -> _Outcome:
        """The answer that is ready, or the way the process ended."""
        try:
            ok, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return _Outcome(error=f"died with exit code {self.process.exitcode}")
        return _Outcome(result=value) if ok else _Outcome(error=str(value))

    def log_tail(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-LOG_TAIL_CHARS:]


def _worker_main(connection: Connection, env: dict[str, str], log_path: str, join_group: bool) -> None:
    """A worker's life: take the environment, join the group, then answer one call after the other."""
    os.environ.update(env)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _answer(connection, _join_group if join_group else _nothing, ())
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # the parent closed its end; gloo's threads make an orderly exit slow and noisy
        _answer(connection, _load_and_call, (message,))


def _load_and_call(message: bytes) -> Any:
    sys.path[:], call = pickle.loads(message)
    fn, args = pickle.loads(call)
    return fn(*args)


def _answer(connection: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = pickle.dumps((True, fn(*args)))  # plain pickle: tensors travel by value, not by shared memory
    except BaseException:  # SystemExit too: a worker answers whatever happens
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(answer)


def _nothing() -> None:
    """What a worker does at its start when the tested function joins the group itself."""


def _join_group() -> None:
    from dsmoelora.parallel import comm

    comm.init("gloo")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
