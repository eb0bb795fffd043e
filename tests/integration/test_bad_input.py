"""Every row of docs/errors.md: one message on rank 0, exit code 1, nothing overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from deepspeed.accelerator import get_accelerator

from dsmoelora.cli import parse_command, run_guarded
from launch import evaluate, export, generate, merge, plan, serve, train
from tests.bad_input import AFTER_A_RUN, EARLY, LATE, ROW, TOGETHER, Bench, make_bench
from tests.conftest import PoolFactory, thorough
from tests.forked import Program
from tests.helpers_distributed import free_port

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROOT = PAGE.parents[1]
PATIENCE_S = 180.0
PROGRAMS = {
    f"{one.__name__.rpartition('.')[2]}.py": one.main for one in (train, generate, export, merge, evaluate, serve, plan)
}
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def rows_of_page() -> dict[str, str]:
    """What is wrong -> the message's excerpt, of all tables of the page."""
    rows = re.findall(r"^\| (.+?) \| `{1,2}(.+?)`{1,2} \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert len({wrong for wrong, _ in rows}) == len(rows), "a row comes twice"
    return dict(rows)


ROWS = rows_of_page()


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    groups = (EARLY, AFTER_A_RUN, LATE, TOGETHER)
    cases = [wrong for group in groups for wrong in group]
    assert sorted(ROWS) == sorted(cases)
    assert len(ROWS) >= 40


def run_program(argv: list[str]) -> tuple[int, str, str]:
    """A program of launch/ in this process: exit code, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", argv),
        patch.dict(os.environ, SINGLE),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        mask = os.umask(0)
        os.umask(mask)
        try:
            code = run_guarded(PROGRAMS[argv[0]])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.umask(mask)
    return code, out.getvalue(), err.getvalue()


def files_in(folder: Path) -> dict[Path, str]:
    """Every file below a folder with the hash of its content."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def check(wrong: str, message: str) -> None:
    """One sentence or more on one line, without a traceback, with what the page promises in it."""
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert ROWS[wrong] in message, message


def try_case(bench: Bench, case: Callable[[Bench], list[str]], wrong: str) -> None:
    argv = case(bench)
    before = files_in(bench.folder)
    code, _, err = run_program(argv)
    check(wrong, err)
    assert code == 1
    assert files_in(bench.folder) == before


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bench(tmp_path_factory.mktemp("bench") / "bench").folder


@pytest.fixture
def bench(pristine: Path, tmp_path: Path) -> Bench:
    """A bench of the test's own, at the place that its recipe names."""
    return copy_bench(pristine, tmp_path / "bench")


def copy_bench(pristine: Path, folder: Path) -> Bench:
    shutil.copytree(pristine, folder)
    for path in [folder / "recipe.yaml", *folder.rglob("adapter_config.json")]:
        path.write_text(path.read_text().replace(str(pristine), str(folder)))
    return Bench(folder)


@pytest.mark.parametrize("wrong", EARLY)
def test_is_found_before_anything_starts(wrong: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr(train, "train", too_late)
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: False)
    try_case(bench, EARLY[wrong], wrong)


def run_command(*argv: str) -> tuple[int, str]:
    """`launch/train.py` in a worker: its exit code, and what it says on stderr about a user's error."""
    with (
        tempfile.TemporaryFile("w+") as err,  # a real file, as the watchdog wants it
        patch("dsmoelora.parallel.comm.shutdown"),
        patch("dsmoelora.cli.SILENT_RANKS_STAY_S", 0),
    ):
        with contextlib.redirect_stderr(err):
            code = run_guarded(lambda: train.run(parse_command(list(argv))))
        err.seek(0)
        _, mark, message = err.read().rpartition("error: ")  # progress bars stand before it
    return code, mark + message if mark else ""


@pytest.fixture(scope="module")
def finished(pristine: Path, tmp_path_factory: pytest.TempPathFactory, worker_pool: PoolFactory) -> Path:
    """A bench with a run of two steps."""
    bench = copy_bench(pristine, tmp_path_factory.mktemp("finished") / "bench")
    assert worker_pool(1).run(run_command, *bench.train()[1:]) == [(0, "")]
    assert (bench.run / "DONE").exists()
    return bench.folder


@pytest.mark.parametrize("wrong", AFTER_A_RUN)
def test_is_found_beside_a_finished_run(wrong: str, finished: Path, tmp_path: Path) -> None:
    try_case(copy_bench(finished, tmp_path / "bench"), AFTER_A_RUN[wrong], wrong)


@pytest.mark.parametrize("wrong", LATE)
def test_is_found_when_it_is_read(wrong: str, finished: Path, tmp_path: Path, worker_pool: PoolFactory) -> None:
    bench = copy_bench(finished, tmp_path / "bench")
    argv = LATE[wrong](bench)
    if "--resume" not in argv:
        argv += ["--run.name", "new"]
    before = files_in(bench.run)
    (code, message), of_other = worker_pool(2).run(run_command, *argv[1:])
    check(wrong, message)
    assert code == 1 and of_other == (1, "")
    after = files_in(bench.run)
    rewritten = {"recipe.yaml", "deepspeed.json", "heartbeat"}  # the old recipe is kept under another name
    kept = {path for path in before if not rewritten & set(path.parts)}
    assert {path: after.get(path) for path in kept} == {path: before[path] for path in kept}


def test_a_wrong_row_in_the_share_of_one_rank_ends_both(
    pristine: Path, tmp_path: Path, worker_pool: PoolFactory
) -> None:
    """Ranks take turns in an unshuffled stream, so the second row is read by rank 1 alone."""
    bench = copy_bench(pristine, tmp_path / "bench")
    argv = [*bench.rows(ROW, {"instruction": "Say it."}, ROW), "--data.streaming", "true", "--data.shuffle_buffer", "1"]
    (_, first), _ = worker_pool(2).run(run_command, *argv[1:])
    assert first.startswith("error: rank 1: ") and "train.jsonl, row 2: output is missing" in first


def both_ranks(bench: Bench, launcher: list[str], argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Two ranks under a launcher, which must end in time without a file in the run folder touched."""
    before = files_in(bench.run)
    command = [*launcher, str(ROOT / "launch" / argv[0]), *argv[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert files_in(bench.run) == before
    return done


def launchers(port: int) -> dict[str, list[str]]:
    ours = [sys.executable, "-m"]
    return {
        "torchrun": [*ours, "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)],
        "deepspeed": [*ours, "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)],
    }


@pytest.mark.parametrize(
    ("launcher", "wrong"),
    [
        ("torchrun", "a weight file is cut short"),
        thorough("torchrun", "the weights lack a tensor"),
        ("deepspeed", "dropout of 1"),
    ],
)
def test_one_rank_speaks_and_both_end(launcher: str, wrong: str, finished: Path, tmp_path: Path) -> None:
    bench = copy_bench(finished, tmp_path / "bench")
    argv = [*(EARLY | LATE)[wrong](bench), "--run.name", "new"]
    done = both_ranks(bench, launchers(free_port())[launcher], argv)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert done.returncode != 0
    assert len(said) == 1 and ROWS[wrong] in said[0], done.stderr
    assert "exitcode  : 1 " in done.stderr or "exits with return code = 1" in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("wrong", TOGETHER)
def test_the_port_is_taken(wrong: str, finished: Path, tmp_path: Path) -> None:
    bench = copy_bench(finished, tmp_path / "bench")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = SINGLE | {"WORLD_SIZE": "2", "MASTER_PORT": port}
        with patch.dict(os.environ, env):
            program, *argv = TOGETHER[wrong](bench)
            before, rank = files_in(bench.run), Program([str(ROOT / "launch" / program), *argv], env=os.environ)
            _, errors = rank.communicate(timeout=PATIENCE_S)
    assert files_in(bench.run) == before
    check(wrong, errors)
    assert rank.returncode == 1
