"""A rank that is killed or hangs: the others say which and end in time, and the run goes on as if nothing had been."""

from __future__ import annotations

import signal
import stat
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsmoelora.cli import parse_command
from dsmoelora.heartbeat import Phase, read_sign
from dsmoelora.metrics_file import read_metrics
from dsmoelora.watchdog import HANG_EXIT_CODE
from launch import train
from tests.conftest import PoolFactory
from tests.launched import Ranks, make_workshop

HANG_TIMEOUT_S = 25.0
NUM_STEPS = 12
COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def argv_of(workshop: Path, name: str, *more: str) -> list[str]:
    settings = {"--run.name": name, "--train.max_steps": NUM_STEPS, "--train.num_samples": 0}
    overrides = [str(word) for pair in settings.items() for word in pair]
    return ["--config", str(workshop / "recipe.yaml"), *overrides, "--train.hang_timeout_s", str(HANG_TIMEOUT_S), *more]


def run_command(*argv: str) -> None:
    """`launch/train.py` in a process that has met the others already."""
    train.run(parse_command(list(argv)))


@pytest.fixture(scope="module")
def undisturbed(workshop: Path, worker_pool: PoolFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    worker_pool(2).run(run_command, *argv_of(workshop, "undisturbed"))
    return workshop / "runs" / "undisturbed"


def assert_ends_like(folder: Path, undisturbed: Path) -> None:
    """Losses, norms and the adapter are equal to the last bit."""
    rows, wanted_rows = (read_metrics(one / "metrics.jsonl") for one in (folder, undisturbed))
    assert [[row.get(name) for name in COMPARED] for row in rows] == [
        [row.get(name) for name in COMPARED] for row in wanted_rows
    ]
    found, wanted = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (folder, undisturbed))
    assert found.keys() == wanted.keys()
    assert all(bool((found[name] == wanted[name]).all()) for name in wanted)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory, victim: int
) -> None:
    name, other = f"killed-{victim}", 1 - victim
    folder, argv = workshop / "runs" / name, argv_of(workshop, name)
    with Ranks(argv, argv) as ranks:
        ranks.wait_for_step(folder, 4)
        ranks.processes[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        (survivor,) = ranks.finish([other], timeout_s=90)
        assert time.monotonic() - begin < HANG_TIMEOUT_S
        pid = ranks.processes[victim].pid
    assert survivor.returncode == 1
    assert f"error: Contact is lost: rank {victim} (host " in survivor.stderr, survivor.stderr
    assert f"pid {pid}, " in survivor.stderr and "--resume auto" in survivor.stderr
    assert "Traceback" not in survivor.stderr
    sign = read_sign(folder, other)
    assert sign is not None and sign.phase is Phase.LEFT

    open_to_all = [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & stat.S_IWOTH]
    assert not open_to_all, "no file of a run may be written by others, even with umask 0"
    worker_pool(2).run(run_command, *argv, "--resume", "auto")
    assert_ends_like(folder, undisturbed)
    sign = read_sign(folder, victim)
    assert sign is not None and (sign.phase, sign.step) == (Phase.DONE, NUM_STEPS)


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    folder, argv = workshop / "runs" / "hung", argv_of(workshop, "hung")
    with Ranks(argv, argv) as ranks:
        ranks.wait_for_step(folder, 4)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        (survivor,) = ranks.finish([0], timeout_s=150)
        assert HANG_TIMEOUT_S - 5 < time.monotonic() - begin < 2 * HANG_TIMEOUT_S
        pid = ranks.processes[1].pid
    assert survivor.returncode == HANG_EXIT_CODE
    assert "error: rank 0: no progress for" in survivor.stderr
    assert "in train_step" in survivor.stderr, "the stacks show where the rank waits"
    assert "Without a sign of life: rank 1 (host " in survivor.stderr and f"pid {pid}, " in survivor.stderr

    worker_pool(2).run(run_command, *argv, "--resume", "auto")
    assert_ends_like(folder, undisturbed)
