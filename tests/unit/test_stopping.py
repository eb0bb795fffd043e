"""How one process hears that it should stop, and what a request interrupts."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from pathlib import Path

import pytest

from dsmoelora.parallel.stopping import Stopped, StopRequest
from tests.helpers_distributed import forks


def wait_until_asked(stop: StopRequest) -> None:
    deadline = time.monotonic() + 10
    while not stop.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.asked


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_requests_and_two_are_one(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    stop = StopRequest(tmp_path)
    with stop.listening():
        assert not stop.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        wait_until_asked(stop)
        stop.poll()  # asks, and does not know yet
        with pytest.raises(Stopped):
            stop.poll()
    assert signal.getsignal(number) is before


def wait_for_ever(folder: Path) -> None:
    with StopRequest(folder).listening():
        (folder / "listening").touch()
        while True:
            ctypes.CDLL(None).pause()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_second_time_ends_the_process_wherever_it_is(number: int, tmp_path: Path) -> None:
    process = forks().Process(target=wait_for_ever, args=(tmp_path,), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "listening").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(1.5)
    assert process.is_alive(), "the first is a request"
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 128 + number


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = StopRequest(tmp_path)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_file_is_a_request_and_goes_away_when_it_was_met(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = StopRequest(tmp_path)
    with stop.listening():
        (tmp_path / "STOP").touch()
        a_minute_ago = time.time() - 60
        os.utime(tmp_path / "STOP", (a_minute_ago, a_minute_ago))
        wait_until_asked(stop)
        with pytest.raises(Stopped):
            stop.check()
        stop.leave("nothing was trained.")
    assert not (tmp_path / "STOP").exists()
    (message,) = caplog.messages
    assert message.endswith(" s after the request: nothing was trained.")
    assert 60.0 <= float(message.split()[1]) < 70.0  # counted from the file's own time


def test_a_look_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network's file system whose server is away for a moment."""
    looks: list[Path] = []
    look = Path.exists

    def exists(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return look(path)

    monkeypatch.setattr(Path, "exists", exists)
    (tmp_path / "STOP").touch()
    stop = StopRequest(tmp_path)
    with stop.listening():
        wait_until_asked(stop)
    assert looks[:2] == [tmp_path / "STOP"] * 2


def test_a_request_interrupts_work_that_waits(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "run")
    began = time.monotonic()

    def sleep() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(30)

    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        with stop.listening(), pytest.raises(Stopped):
            stop.together(sleep)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - began < 10
    assert (tmp_path / "run" / "STOP").exists(), "other ranks may be at work for this one"


def test_work_does_not_begin_after_a_request(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path)
    done: list[int] = []
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until_asked(stop)
        with pytest.raises(Stopped):
            stop.together(lambda: done.append(1))
    assert not done


def test_work_without_a_request_gives_its_result() -> None:
    assert StopRequest().together(lambda: 5) == 5
