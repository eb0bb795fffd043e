"""`python FILE ARGV` without the seconds that imports take: forked from the server of `helpers_distributed.forks`."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.helpers_distributed import forks


class Program:
    """A running program, with the part of `subprocess.Popen`'s interface that tests use.

    Args:
        argv: a Python file and its arguments
        env: the whole environment
        umask: of the program
    """

    def __init__(self, argv: list[str], env: Mapping[str, str], umask: int = 0o022) -> None:
        self.args = argv
        with tempfile.TemporaryDirectory(prefix="program-") as folder:
            paths = [Path(folder) / name for name in ("out", "err")]
            for path in paths:
                path.touch()
            self._streams = [path.open(encoding="utf-8", errors="replace") for path in paths]
            self._process = forks().Process(
                target=_run, args=(argv, dict(env), str(Path.cwd()), umask, *map(str, paths))
            )
            self._process.start()
            while paths[1].exists():  # the program takes it away when it has opened both
                if self._process.exitcode is not None:
                    raise RuntimeError(f"{argv[0]} ended before it began")
                time.sleep(0.005)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To a process that may have ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            TimeoutExpired: it still runs
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and give what it wrote to stdout and stderr."""
        self.wait(timeout)
        for stream in self._streams:
            stream.seek(0)
        out, err = (stream.read() for stream in self._streams)
        return out, err


def _run(argv: list[str], env: dict[str, str], folder: str, umask: int, out: str, err: str) -> None:
    """What `python FILE ARGV` does from its first line on."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    os.umask(umask)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    Path(err).unlink()
    sys.argv = argv
    atexit._clear()
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
