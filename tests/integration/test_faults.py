"""Ranks that are killed or hang, disks that fill up, files that rot or vanish: it is said, and the run goes on later.

"Goes on" means: to the same losses and the same adapter as a run that nothing happened to, to the last bit.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsmoelora.cli import parse_command
from dsmoelora.errors import UserError
from dsmoelora.parallel.watchdog import HANG_EXIT_CODE
from dsmoelora.run.files import read_metrics
from dsmoelora.signs_of_life.heartbeat import Phase, read_sign
from launch import train
from tests.conftest import PoolFactory
from tests.launched import Ranks, make_workshop

HANG_TIMEOUT_S = 15.0  # nothing beats while DeepSpeed is initialised, which a busy machine does slowly
NUM_STEPS = 12
PATIENCE_S = 240.0  # of a run in the pool, on a busy machine
COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def argv_of(workshop: Path, name: str) -> list[str]:
    settings = {"--run.name": name, "--train.max_steps": NUM_STEPS, "--train.num_samples": 0}
    return ["--config", str(workshop / "recipe.yaml"), *(str(word) for pair in settings.items() for word in pair)]


def run_command(*argv: str) -> None:
    """`launch/train.py` in a process that has met the others already."""
    train.run(parse_command(list(argv)))


def attempt(argv: list[str], largest_file: int | None = None) -> str:
    """Run the command; the message of the user's error that ended it, empty if none did.

    Args:
        argv: command line
        largest_file: bytes after which a file cannot grow, as if the disk were full
    """
    try:
        with nullcontext() if largest_file is None else no_file_above(largest_file):
            run_command(*argv)
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Inside the block no file grows beyond this size, and nothing is printed, for a worker prints to a file."""
    before, printed_to = resource.getrlimit(resource.RLIMIT_FSIZE), [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for stream, old in zip((1, 2), printed_to, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(nowhere)


@pytest.fixture(scope="module")
def undisturbed(workshop: Path, worker_pool: PoolFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    worker_pool(2).run(run_command, *argv_of(workshop, "undisturbed"), timeout_s=PATIENCE_S)
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
        (survivor,) = ranks.finish([other], timeout_s=90)
        pid = ranks.processes[victim].pid
    assert survivor.returncode == 1
    assert f"error: Contact is lost: rank {victim} (host " in survivor.stderr, survivor.stderr
    assert f"pid {pid}, " in survivor.stderr and "--resume auto" in survivor.stderr
    assert "Traceback" not in survivor.stderr
    sign = read_sign(folder, other)
    assert sign is not None and sign.phase is Phase.LEFT

    open_to_all = [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & stat.S_IWOTH]
    assert not open_to_all, "no file of a run may be written by others, even with umask 0"
    worker_pool(2).run(run_command, *argv, "--resume", "auto", timeout_s=PATIENCE_S)
    assert_ends_like(folder, undisturbed)
    sign = read_sign(folder, victim)
    assert sign is not None and (sign.phase, sign.step) == (Phase.DONE, NUM_STEPS)


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    folder, argv = workshop / "runs" / "hung", argv_of(workshop, "hung")
    short = [*argv, "--train.hang_timeout_s", str(HANG_TIMEOUT_S)]
    with Ranks(short, short) as ranks:
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

    worker_pool(2).run(run_command, *argv, "--resume", "auto", timeout_s=PATIENCE_S)
    assert_ends_like(folder, undisturbed)


def test_a_disk_that_is_full_ends_the_run_and_loses_nothing(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    folder, argv = workshop / "runs" / "full", argv_of(workshop, "full")
    shutil.copytree(undisturbed, folder)
    for name in ("checkpoint-12", "adapter"):
        shutil.rmtree(folder / name)
    argv += ["--resume", "auto"]
    largest = (folder / "checkpoint-9" / "rank-00000.safetensors").stat().st_size
    for message in worker_pool(2).run(attempt, argv, largest - 1):
        assert "File too large. Check room and permissions there" in message
        assert "older checkpoints are untouched" in message
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-9"}
    assert worker_pool(2).run(attempt, argv) == ["", ""]
    assert_ends_like(folder, undisturbed)


def test_a_flipped_byte_and_half_a_folder_cost_the_steps_since_the_last_whole_checkpoint(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    folder, argv = workshop / "runs" / "rotten", argv_of(workshop, "rotten")
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "adapter")
    rotten = folder / "checkpoint-12" / "rank-00001.safetensors"
    data = bytearray(rotten.read_bytes())
    data[len(data) // 2] ^= 0xFF
    rotten.write_bytes(data)
    (folder / "checkpoint-15").mkdir()
    shutil.copy(folder / "checkpoint-12" / "rank-00000.safetensors", folder / "checkpoint-15")
    messages = worker_pool(2).run(attempt, [*argv, "--resume", str(folder / "checkpoint-15")])
    assert all("checkpoint-15 is no whole checkpoint" in message for message in messages)
    assert worker_pool(2).run(attempt, [*argv, "--resume", "auto"]) == ["", ""]
    assert_ends_like(folder, undisturbed)


def test_a_data_file_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    folder, argv = workshop / "runs" / "vanished", argv_of(workshop, "vanished")
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "checkpoint-12")
    before = sorted(folder.rglob("*"))
    data, elsewhere = workshop / "train.jsonl", workshop / "elsewhere.jsonl"
    data.rename(elsewhere)
    try:
        for message in worker_pool(2).run(attempt, [*argv, "--resume", "auto"]):
            assert "data.train" in message and str(data) in message
        assert sorted(folder.rglob("*")) == before
    finally:
        elsewhere.rename(data)
    assert worker_pool(2).run(attempt, [*argv, "--resume", "auto"]) == ["", ""]
    assert_ends_like(folder, undisturbed)


def test_a_run_that_branched_off_goes_on_from_there_until_it_has_a_checkpoint_of_its_own(
    workshop: Path, undisturbed: Path, worker_pool: PoolFactory
) -> None:
    """By the same command as before, as a job that comes back gives it, or by `auto`."""
    folder, argv, start = workshop / "runs" / "branch", argv_of(workshop, "branch"), undisturbed / "checkpoint-9"
    named, auto = [*argv, "--resume", str(start)], [*argv, "--resume", "auto"]
    no_room = (start / "rank-00000.safetensors").stat().st_size - 1
    for command in (named, auto):
        for message in worker_pool(2).run(attempt, command, no_room):
            assert "File too large" in message
        assert not list(folder.glob("checkpoint-*"))
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [10, 11, 12]
    assert worker_pool(2).run(attempt, named) == ["", ""]
    steps = [[row["step"], row["loss"]] for row in read_metrics(undisturbed / "metrics.jsonl") if row["step"] > 9]
    assert [[row["step"], row["loss"]] for row in read_metrics(folder / "metrics.jsonl")] == steps
    assert worker_pool(2).run(attempt, [*named, "--train.max_steps", str(NUM_STEPS + 1)]) == ["", ""]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [10, 11, 12, 13]


def test_what_cannot_go_on_leaves_the_run_as_it_is(workshop: Path, undisturbed: Path, worker_pool: PoolFactory) -> None:
    """Another seed by mistake, and checkpoints of which none can be read."""
    folder, argv = workshop / "runs" / "left", [*argv_of(workshop, "left"), "--resume", "auto"]
    shutil.copytree(undisturbed, folder)

    def told(*more: str) -> str:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".jsonl", ".yaml", ".json")}
        message, same = worker_pool(2).run(attempt, [*argv, *more])
        now = {path: path.read_bytes() for path in before if "heartbeat" not in str(path)}
        assert message == same and now == {path: before[path] for path in now}
        assert len(list(folder.glob("*.yaml"))) == 1
        return message

    assert "run.seed was 3, and is 4" in told("--run.seed", "4")
    for checkpoint in folder.glob("checkpoint-*"):
        index = checkpoint / "index.json"
        index.write_text(index.read_text().replace('"version": 2', '"version": 3'))
    message = told()
    assert "checkpoint-12 is no whole checkpoint: index.json has format version 3, known is 2" in message
    assert "move them away to begin at step 0" in message
