"""Ending a run early and whole: somebody asks one rank, all ranks agree, save, and leave.

A run is asked by a signal to any of its processes (SIGUSR1, SIGTERM, SIGINT as from Ctrl-C, SIGHUP as from a terminal
that closes), or by a file `STOP` in its folder. The request is a flag of one process until an all-reduce has made it
everybody's; then `Stopped` is raised, at the same place on every rank. A second SIGINT or SIGHUP ends its process.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dsmoelora.parallel import comm

logger = logging.getLogger(__name__)

STOP_FILE = "STOP"
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FROM_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
_ONCE_S = 1.0  # a terminal and the launcher in it may both send what somebody asked for once
_LOOK_EVERY_S = 0.5

Result = TypeVar("Result")


class Stopped(BaseException):
    """The run was asked to stop. No error: as with KeyboardInterrupt, `except Exception` lets it by."""


class StopRequest:
    """Whether this run was asked to stop, here and on any rank.

    Args:
        folder: of the run, in which a file `STOP` is a request; None listens to nothing

    Attributes:
        agreed: all ranks know that one of them was asked
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.agreed = False
        self._file = None if folder is None else folder / STOP_FILE
        self._asked_at: float | None = None
        self._interrupts = False
        self._pid = os.getpid()
        self._answer: Callable[[], bool] | None = None
        self._heard: dict[int, float] = {}

    @property
    def asked(self) -> bool:
        """Whether this process was asked; no other rank need know."""
        return self._asked_at is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals and the file as requests for as long as this lasts (main thread).

        A second SIGUSR1 or SIGTERM changes nothing: a save under way goes on, and ends as a save does. Signals that
        are ignored stay so, as SIGHUP is under nohup.
        """
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        ended = threading.Event()
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        # Python's handlers wait for a main thread that is in a collective, this does not.
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(ended, ear), name="stop", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            signal.set_wakeup_fd(before)
            ear.close()
            mouth.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def together(self, fn: Callable[[], Result]) -> Result:
        """`comm.together` for long work without collectives, such as tokenising: a request interrupts it at once.

        Raises:
            Stopped: on all ranks, when any was asked
        """

        def interruptible() -> Any:
            try:
                self._interrupts = True
                if self.asked:
                    raise Stopped
                return fn()
            except Stopped:
                # The others may be waiting for this rank's work, or do it themselves: they look for the file.
                self._tell_others()
                return None
            finally:
                self._interrupts = False

        result = comm.together(interruptible)
        self.check()
        return result

    def poll(self) -> None:
        """Ask all ranks without waiting for the answer, which the next call reads: cheap enough for every forward.

        Raises:
            Stopped: on all ranks, when any was asked by the time of the last call
        """
        if self._answer is not None:
            self.agreed |= self._answer()
            self._answer = None
        if self.agreed:
            raise Stopped
        self._answer = comm.start_any_rank(self.asked)

    def look(self) -> None:
        """Ask all ranks and wait for the answer, which is `agreed`."""
        self.agreed |= comm.any_rank(self.asked)

    def check(self) -> None:
        """Ask all ranks and wait for the answer.

        Raises:
            Stopped: on all ranks, when any was asked
        """
        self.look()
        if self.agreed:
            raise Stopped

    def leave(self, what_is_left: str) -> None:
        """Say how long it took, and take the file away, so that the run can go on (collective; rank 0 does it).

        Args:
            what_is_left: end of the message
        """
        seconds = comm.gather_objects(0.0 if self._asked_at is None else time.time() - self._asked_at)
        if seconds is None:
            return
        logger.warning("Stopped %.1f s after the request: %s", max(seconds), what_is_left)
        if self._file is not None:
            with suppress(OSError):  # a folder that can no longer be written has been reported by the save
                self._file.unlink(missing_ok=True)

    def _ask(self, at: float) -> None:
        """The one way in, in the main thread alone."""
        if self._asked_at is None:
            self._asked_at = at
            if self._interrupts:
                raise Stopped

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._pid:  # a helper that was forked inherits the handler, and should end as it always would
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGHUP:
            _let_go_of_terminal()
        at = time.time()
        if self._file is not None:
            with suppress(OSError):
                at = min(at, self._file.stat().st_mtime)
        self._ask(at)

    def _watch(self, ended: threading.Event, ear: socket.socket) -> None:
        """Turn the file into a signal, which reaches the main thread wherever it is, and count a terminal's signals."""
        main = threading.main_thread().ident
        assert main is not None, "the main thread runs"
        has_seen_file = False
        while not ended.is_set():
            if select.select([ear], [], [], _LOOK_EVERY_S)[0]:
                for number in ear.recv(64):
                    self._count(number)
            with suppress(OSError):  # of a network's file system; the next look may be luckier
                if not has_seen_file and self._file is not None and self._file.exists():
                    has_seen_file = True
                    signal.pthread_kill(main, _SIGNALS[0])

    def _count(self, number: int) -> None:
        if number not in _FROM_A_TERMINAL:
            return
        now = time.monotonic()
        first = self._heard.setdefault(number, now)
        if first == now and comm.rank() == 0:
            logger.warning("%s: the run saves and leaves. Once more ends it at once.", signal.Signals(number).name)
        elif now - first > _ONCE_S:
            os._exit(128 + number)

    def _tell_others(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # then the others finish their work first
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.touch()


def _let_go_of_terminal() -> None:
    """Print nowhere what would be printed on a terminal that is gone: there it would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if os.isatty(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)
