"""Notices a rank that hangs or is gone, says which, and ends the process: a dead job must not hold its nodes.

Every rank has its own watchdog, and all follow the same rules:

- No progress (see `heartbeat`) for `train.hang_timeout_s`: the stacks of all threads go to stderr, and the process
  ends with `HANG_EXIT_CODE`.
- A collective fails because a peer is gone: `LostRankError` names those that give no sign of life any more.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dsmoelora.errors import ConfigError, LostRankError
from dsmoelora.parallel import comm
from dsmoelora.parallel.stopping import STOP_FILE
from dsmoelora.signs_of_life.heartbeat import (
    INTERVAL_S,
    Heartbeat,
    Phase,
    Sign,
    clear_signs,
    read_sign,
    running_elsewhere,
    silent_ranks,
    write_sign,
)

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 75
_MIN_PATIENCE_S = 3.0
_REMEDY = "The newest whole checkpoint is untouched: start again with `--resume auto`"
_ELSEWHERE = f"stop it (touch {{folder}}/{STOP_FILE}), or set another run.name"


@contextmanager
def watched(
    folder: Path, hang_timeout_s: float, remedy: str = _REMEDY, elsewhere: str = _ELSEWHERE
) -> Iterator[Heartbeat]:
    """Watch over what is done inside (collective); it reports its progress to the heartbeat it gets.

    Args:
        folder: of the run
        hang_timeout_s: how long nothing may happen
        remedy: what to do about a rank that hangs or is gone
        elsewhere: what to do about another start in the same `{folder}` beside waiting for its end

    Raises:
        ConfigError: another start of this run is alive
        LostRankError: instead of a collective's error, when a peer is gone
    """
    comm.together(lambda: _claim(folder, elsewhere.format(folder=folder)) if comm.rank() == 0 else None)
    comm.set_timeout(hang_timeout_s)
    watchdog = Watchdog(folder, Heartbeat(), hang_timeout_s, comm.rank(), comm.world_size(), remedy)
    watchdog.start()
    try:
        yield watchdog.heartbeat
    except BaseException as error:
        if not comm.is_lost_contact(error):
            watchdog.stop(Phase.FAILED, f"{type(error).__name__}: {error}")
            raise
        lost = watchdog.explain_lost_contact(str(error))
        watchdog.stop(Phase.LEFT, "another rank was gone")
        raise lost from error
    watchdog.stop(Phase.DONE)


def _claim(folder: Path, elsewhere: str) -> None:
    """Two jobs in one folder would remove each other's half-written checkpoints."""
    other = running_elsewhere(folder)
    if other is not None:
        raise ConfigError(f"{folder} is in use: {other} is alive. Wait for its end, {elsewhere}.")
    clear_signs(folder)


class Watchdog:
    """A thread that gives this rank's signs of life and ends the process when there is no progress.

    Time in which the whole process was stopped (`scontrol suspend`, a closed lid) does not count.

    Args:
        folder: of the run, shared by all ranks; signs go below it
        heartbeat: what to look at
        hang_timeout_s: seconds without a beat that mean a hang
        rank, world_size: of this process
        remedy: for what it says where a rank hangs or is gone
    """

    def __init__(
        self,
        folder: Path,
        heartbeat: Heartbeat,
        hang_timeout_s: float,
        rank: int,
        world_size: int,
        remedy: str = _REMEDY,
    ) -> None:
        self.heartbeat = heartbeat
        self._folder, self._timeout_s, self._remedy = folder, hang_timeout_s, remedy
        self._rank, self._others = rank, [other for other in range(world_size) if other != rank]
        self._interval_s = min(INTERVAL_S, hang_timeout_s / 8)
        self._patience_s = max(_MIN_PATIENCE_S, 3 * self._interval_s)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._give_sign()
        self._thread.start()

    def stop(self, phase: Phase, reason: str = "") -> None:
        """End the watch and say how the rank ended."""
        self._stopped.set()
        self._thread.join()
        self.heartbeat.phase = phase
        self._give_sign(reason)

    def explain_lost_contact(self, symptom: str) -> LostRankError:
        """Find out who is gone; takes some seconds, until all ranks that live have given another sign."""
        self.heartbeat.beat()  # the hang timeout begins anew: looking for the culprit is progress
        silent = silent_ranks(self._folder, self._others, self._patience_s)
        signs = {rank: read_sign(self._folder, rank) for rank in self._others}
        failed = {rank: sign for rank, sign in signs.items() if sign and sign.phase is Phase.FAILED}
        culprits: Mapping[int, Sign | None] = silent or failed
        if culprits:
            what = f"Contact is lost: {_named(culprits)} {'is' if len(culprits) == 1 else 'are'} gone."
        else:
            what = (
                "Contact between the ranks is lost, though all give signs of life: a network cut, or an error in one "
                f"of them (see above). {symptom.splitlines()[0] if symptom else ''}"
            )
        speaker = min(rank for rank in (self._rank, *self._others) if rank not in culprits)
        return LostRankError(f"{what} {self._remedy}.", is_speaker=self._rank == speaker)

    def _run(self) -> None:
        last_beat, idle_s, before = self.heartbeat.num_beats, 0.0, time.monotonic()
        while not self._stopped.wait(self._interval_s):
            self._give_sign()
            # Should some library hold the interpreter's lock for ever, this thread would stand still as well; then at
            # least the stacks are printed, and the other ranks notice that no sign of life comes.
            faulthandler.dump_traceback_later(self._timeout_s + self._patience_s, exit=False)
            now = time.monotonic()
            idle_s += min(now - before, 2 * self._interval_s)
            before = now
            if self.heartbeat.num_beats != last_beat:
                last_beat, idle_s = self.heartbeat.num_beats, 0.0
            elif idle_s > self._timeout_s:
                self._end_process(idle_s)
        faulthandler.cancel_dump_traceback_later()

    def _end_process(self, idle_s: float) -> None:
        step, phase = self.heartbeat.step, self.heartbeat.phase
        where = f"error: rank {self._rank}: no progress for {idle_s:.0f} s ({phase} at step {step}). "
        _say(f"{where}The stacks of its threads:\n{_stacks()}")
        silent = silent_ranks(self._folder, self._others, self._patience_s)
        _say(f"{where}{self._blame(silent)} {self._remedy}. If the work is only slow, raise train.hang_timeout_s.\n")
        self.heartbeat.phase = Phase.LEFT
        self._give_sign("no progress")
        os._exit(HANG_EXIT_CODE)

    def _blame(self, silent: dict[int, Sign | None]) -> str:
        if silent:
            return f"Without a sign of life: {_named(silent)}."
        own = Sign(self._rank, self.heartbeat.step, self.heartbeat.phase, self.heartbeat.time, time.time())
        signs = [own, *filter(None, (read_sign(self._folder, rank) for rank in self._others))]
        # Whoever stopped first keeps the others waiting; idle times are differences of one clock each.
        longest = max(signs, key=lambda sign: sign.alive - sign.time)
        return f"All ranks live; without progress for longest: {longest}."

    def _give_sign(self, reason: str = "") -> None:
        beat = self.heartbeat
        try:
            write_sign(self._folder, Sign(self._rank, beat.step, beat.phase, beat.time, time.time(), reason))
        except OSError as error:  # a sign that cannot be given must not end a healthy run
            logger.debug("No sign of life could be written: %s", error)


def _named(ranks: Mapping[int, Sign | None]) -> str:
    return ", ".join(str(sign) if sign else f"rank {rank} (never gave a sign)" for rank, sign in ranks.items())


def _stacks() -> str:
    """The stacks of all threads, in one piece so that those of several ranks do not mix."""
    descriptor = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")
    finally:
        os.close(descriptor)


def _say(text: str) -> None:
    stream = sys.__stderr__
    if stream is not None:  # the plain one: a progress bar may sit on sys.stderr
        with suppress(OSError):  # a log on a full disk must not keep a process that hangs from its end
            stream.write(text)
            stream.flush()
