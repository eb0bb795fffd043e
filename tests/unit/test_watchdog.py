"""Signs of life, who is found silent, and what a watchdog does to its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.errors import ConfigError
from dsmoelora.parallel import comm
from dsmoelora.parallel.watchdog import HANG_EXIT_CODE, Watchdog, watched
from dsmoelora.signs_of_life.heartbeat import (
    Heartbeat,
    Phase,
    Sign,
    clear_signs,
    read_sign,
    running_elsewhere,
    sign_file,
    silent_ranks,
    write_sign,
)


def sign(rank: int, phase: Phase = Phase.TRAIN, alive: float = 1000.0, reason: str = "") -> Sign:
    return Sign(rank, 7, phase, alive - 1, alive, reason, f"node{rank}", 100 + rank)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clear_signs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("reason", ["", "short", "x" * 5000, "語" * 5000, 'a "quoted"\nline'])
def test_a_sign_comes_back_and_its_file_never_grows(folder: Path, reason: str) -> None:
    write_sign(folder, sign(3, Phase.FAILED, reason="a longer one before"))
    write_sign(folder, sign(3, Phase.FAILED, reason=reason))
    found = read_sign(folder, 3)
    assert found is not None and reason.startswith(found.reason) and bool(found.reason) == bool(reason)
    assert found == sign(3, Phase.FAILED, reason=found.reason)
    assert sign_file(folder, 3).stat().st_size == 512


def test_signs_of_an_earlier_start_are_removed(folder: Path) -> None:
    write_sign(folder, sign(5))
    clear_signs(folder)
    assert read_sign(folder, 5) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"phase": "nap"}', b'{"phase": "train"}', b"\xff"])
def test_what_cannot_be_read_is_no_sign(folder: Path, content: bytes) -> None:
    sign_file(folder, 0).write_bytes(content)
    assert read_sign(folder, 0) is None


def test_ranks_without_a_new_sign_are_found(folder: Path) -> None:
    """Rank 0 lives on, rank 1 does not, rank 2 never gave a sign, rank 3 has ended."""
    for each in (sign(0), sign(1), sign(3, Phase.DONE)):
        write_sign(folder, each)
    living = threading.Timer(0.2, write_sign, (folder, sign(0, alive=1001.0)))
    living.start()
    assert silent_ranks(folder, range(4), patience_s=1.0) == {1: sign(1), 2: None}
    living.join()


def test_nobody_waits_when_all_live(folder: Path) -> None:
    write_sign(folder, sign(0))
    threading.Timer(0.1, write_sign, (folder, sign(0, alive=1001.0))).start()
    begin = time.monotonic()
    assert silent_ranks(folder, [0], patience_s=60.0) == {}
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("is_here", [True, False])
def test_a_folder_that_another_start_uses_is_refused(
    folder: Path, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes signs is alive: a process of this node, or of another."""
    monkeypatch.setattr("dsmoelora.signs_of_life.heartbeat.INTERVAL_S", 1.0)
    place = {"pid": os.getppid()} if is_here else {"host": "elsewhere", "pid": 1}
    write_sign(folder, Sign(0, 7, Phase.TRAIN, 0.0, time.time(), **place))
    next_sign = threading.Timer(0.2, write_sign, (folder, Sign(0, 8, Phase.TRAIN, 0.0, time.time(), **place)))
    next_sign.start()
    expected = r"is in use: rank 0 \(host .* at step [78]\) is alive.*set another run.name"
    with pytest.raises(ConfigError, match=expected), watched(folder, 60.0):
        pass
    next_sign.join()
    found = read_sign(folder, 0)
    assert found is not None and found.step == 8, "nothing of the other's is removed"


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def zombie_pid() -> int:
    """Of a process that has ended, and that this one has not asked how."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


@pytest.mark.parametrize(
    ("phase", "age_s", "place"),
    [
        (Phase.DONE, 0.0, {"host": "elsewhere"}),
        (Phase.TRAIN, 3600.0, {"host": "elsewhere"}),
        (Phase.TRAIN, 0.0, {"pid": dead_pid()}),
        (Phase.TRAIN, 0.0, {"pid": zombie_pid()}),
        (Phase.TRAIN, 0.0, {"pid": os.getpid()}),
    ],
)
def test_what_an_ended_start_left_behind_is_no_obstacle(
    folder: Path, phase: Phase, age_s: float, place: dict[str, Any]
) -> None:
    write_sign(folder, Sign(0, 7, phase, 0.0, time.time() - age_s, **place))
    begin = time.monotonic()
    assert running_elsewhere(folder) is None
    assert time.monotonic() - begin < 5, "nobody waits"


def test_a_process_that_is_suspended_still_has_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that did not live yet when the sign was written, and has the number of one that has ended."""
    monkeypatch.setattr("dsmoelora.signs_of_life.heartbeat.INTERVAL_S", 0.2)
    with subprocess.Popen(["sleep", "600"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        found = []
        for age_s in (0.0, 3600.0):
            write_sign(folder, Sign(0, 7, Phase.TRAIN, 0.0, time.time() - age_s, pid=process.pid))
            found.append(running_elsewhere(folder))
        process.kill()
    assert found[0] is not None and found[0].pid == process.pid and found[1] is None


def test_a_start_that_is_about_to_end_here_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoelora.signs_of_life.heartbeat.INTERVAL_S", 1.0)
    with subprocess.Popen(["sleep", "0.5"]) as process:
        write_sign(folder, Sign(0, 7, Phase.TRAIN, 0.0, time.time(), pid=process.pid))
        assert running_elsewhere(folder) is None


@pytest.mark.parametrize("behind_s", [65.0, -600.0])
def test_clocks_of_nodes_are_not_compared(folder: Path, behind_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoelora.signs_of_life.heartbeat.INTERVAL_S", 1.0)
    signs = [Sign(0, 7, Phase.TRAIN, 0.0, time.time() - behind_s + k, host="elsewhere") for k in range(2)]
    write_sign(folder, signs[0])
    threading.Timer(0.2, write_sign, (folder, signs[1])).start()
    assert running_elsewhere(folder) == signs[1]


def test_a_start_that_was_killed_on_another_node_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoelora.signs_of_life.heartbeat.INTERVAL_S", 0.2)
    write_sign(folder, Sign(0, 7, Phase.TRAIN, 0.0, time.time(), host="elsewhere"))
    assert running_elsewhere(folder) is None


def explain(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    monkeypatch.setattr("dsmoelora.parallel.watchdog._MIN_PATIENCE_S", 0.3)
    error = Watchdog(folder, Heartbeat(), 0.1, rank, 3).explain_lost_contact("Connection closed by peer\nframe 0")
    return str(error), error.is_speaker


def test_the_lowest_rank_that_is_left_names_the_missing_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sign(folder, sign(0))
    for rank in (1, 2):
        write_sign(folder, sign(rank, Phase.LEFT))
    text, speaks = explain(folder, 1, monkeypatch)
    assert text.startswith("Contact is lost: rank 0 (host node0, pid 100, last sign of life ") and speaks
    assert "train at step 7) is gone." in text and "--resume auto" in text
    assert not explain(folder, 2, monkeypatch)[1]


def test_a_rank_that_failed_is_named_with_its_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sign(folder, sign(0, Phase.LEFT))
    write_sign(folder, sign(1, Phase.FAILED, reason="OutOfMemoryError: too much"))
    text, speaks = explain(folder, 2, monkeypatch)
    assert "rank 1 (host node1, " in text and "failed at step 7: OutOfMemoryError: too much" in text
    assert not speaks


def test_a_cut_network_is_called_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(3):
        write_sign(folder, sign(rank, Phase.LEFT))
    text, speaks = explain(folder, 0, monkeypatch)
    assert "all give signs of life: a network cut" in text and "Connection closed by peer" in text and speaks
    assert "frame 0" not in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[../gloo/buffer.cc:84] Timed out waiting 1800000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_lost_contact_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert comm.is_lost_contact(error) is expected


LIFE = """
import sys, time
from pathlib import Path
from dsmoelora.signs_of_life.heartbeat import Heartbeat, Phase, clear_signs
from dsmoelora.parallel.watchdog import Watchdog

def oversleep():
    time.sleep(60)

folder, how = Path(sys.argv[1]), sys.argv[2]
clear_signs(folder)
watchdog = Watchdog(folder, Heartbeat(), 2.0, 0, 1)
watchdog.start()
print("begun", flush=True)
for step in range(25 if how == "works" else 3):
    watchdog.heartbeat.enter(Phase.TRAIN, step)
    time.sleep(0.2)
if how == "hangs":
    oversleep()
watchdog.stop(Phase.DONE)
"""


def start_life(folder: Path, how: str, stderr: Any = subprocess.PIPE) -> subprocess.Popen:
    folder.mkdir()
    command = [sys.executable, "-c", LIFE, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_a_hang_ends_a_process_that_cannot_say_so(tmp_path: Path) -> None:
    """As with a log on a disk that is full."""
    with Path("/dev/full").open("w") as full:
        hanging = start_life(tmp_path / "a", "hangs", stderr=full)
    try:
        assert hanging.wait(timeout=40) == HANG_EXIT_CODE
    finally:
        hanging.kill()
        hanging.communicate()


def test_a_hang_ends_the_process_and_work_or_a_suspension_does_not(tmp_path: Path) -> None:
    hanging, working = start_life(tmp_path / "a", "hangs"), start_life(tmp_path / "b", "works")
    try:
        assert working.stdout is not None and working.stdout.readline() == "begun\n"
        os.kill(working.pid, signal.SIGSTOP)  # as `scontrol suspend` does
        time.sleep(4)
        os.kill(working.pid, signal.SIGCONT)
        _, said = hanging.communicate(timeout=60)
        assert hanging.returncode == HANG_EXIT_CODE
        assert "error: rank 0: no progress for 2 s (train at step 2)" in said
        assert "in oversleep" in said and "raise train.hang_timeout_s" in said
        left = read_sign(tmp_path / "a", 0)
        assert left is not None and (left.phase, left.step, left.reason) == (Phase.LEFT, 2, "no progress")
        _, said = working.communicate(timeout=60)
        assert (working.returncode, said) == (0, "")
        done = read_sign(tmp_path / "b", 0)
        assert done is not None and (done.phase, done.step, done.pid) == (Phase.DONE, 24, working.pid)
    finally:
        for process in (hanging, working):
            process.kill()
