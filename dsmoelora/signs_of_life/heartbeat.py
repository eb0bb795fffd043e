"""Signs of life: what a rank last did, in its memory for its own watchdog and in the run folder for all the others.

`heartbeat/rank-00003.json` holds a `Sign`. It is written in place, with a fixed length and without a sync: readers on
other nodes see new content of an old file sooner than a new file of an old name, and a full disk does not stop it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

FOLDER = "heartbeat"
INTERVAL_S = 5.0  # between two signs of a rank, at most
_FRESH_S = 60.0  # as old may a living rank's sign look where clocks of nodes differ
_FORGOTTEN_S = 3600.0  # no clocks of nodes differ by as much
_FILE_BYTES = 512  # of a file; room for the longest host name and a reason
_REASON_CHARS = 160


class Phase(StrEnum):
    """What a rank is at, or how it ended."""

    START = "start"  # reads data, makes folders
    BUILD = "build"  # loads the model, forms the process groups
    TRAIN = "train"
    EVALUATE = "evaluate"
    GENERATE = "generate"
    SAVE = "save"
    LOAD = "load"  # a checkpoint
    DONE = "done"
    FAILED = "failed"  # an error of its own, or of the user's
    LEFT = "left"  # because another rank was gone or hung


ENDED = (Phase.DONE, Phase.FAILED, Phase.LEFT)


class Heartbeat:
    """What this rank is doing. `beat` is for the hot path: it counts, and touches no file.

    Attributes:
        phase: what the rank is at
        step: optimizer steps taken
        num_beats: grows with everything that gets done; standing still for long means a hang
        time: of the last beat, in seconds since 1970
    """

    def __init__(self) -> None:
        self.phase, self.step, self.num_beats, self.time = Phase.START, 0, 0, time.time()

    def enter(self, phase: Phase, step: int) -> None:
        """Something new begins."""
        self.phase, self.step = phase, step
        self.beat()

    def beat(self) -> None:
        """A piece of it is done: a forward pass, a part of a file."""
        self.num_beats += 1
        self.time = time.time()


@dataclass(frozen=True)
class Sign:
    """What a rank's file says.

    Args:
        rank: of the writer
        host: its node
        pid: its process there
        step: optimizer steps taken
        phase: what it is at, or how it ended
        time: of its last progress, in seconds since 1970
        alive: when this was written, by the writer's clock
        reason: why it ended, where it ended badly
    """

    rank: int
    step: int
    phase: Phase
    time: float
    alive: float
    reason: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def is_fresh(self) -> bool:
        """Whether the writer may live; a crash leaves a fresh sign behind for a while."""
        return self.phase not in ENDED and time.time() - self.alive < _FRESH_S

    def __str__(self) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(self.alive))
        what = f"{self.phase} at step {self.step}" + (f": {self.reason}" if self.reason else "")
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, last sign of life {at}, {what})"


def sign_file(folder: Path, rank: int) -> Path:
    """Where a rank of the run in `folder` gives its signs of life."""
    return folder / FOLDER / f"rank-{rank:05d}.json"


def clear_signs(folder: Path) -> None:
    """Make the folder of signs, and remove those of an earlier start, which may have had more ranks (rank 0)."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for file in (folder / FOLDER).glob("rank-*.json"):
        file.unlink()


def running_elsewhere(folder: Path) -> Sign | None:
    """The sign of rank 0 of another start of the run in `folder` that is alive now.

    Takes three signs' time where it gives no new one: it may be about to end, or have ended without a word on another
    node. A process of this node is looked for, and lives while it is suspended, too; one of another node that is
    suspended cannot be told from one that is gone.
    """
    sign = read_sign(folder, 0)
    if sign is None or sign.phase in ENDED:
        return None
    is_here = sign.host == socket.gethostname()
    if not _lives_here(sign) if is_here else time.time() - sign.alive > _FORGOTTEN_S:
        return None
    is_silent = bool(silent_ranks(folder, [0], 3 * INTERVAL_S))
    sign = read_sign(folder, 0)
    if sign is None or sign.phase in ENDED or (is_silent and not (is_here and _lives_here(sign))):
        return None
    return sign


def _lives_here(sign: Sign) -> bool:
    """Whether the writer, a process of this node, is another one than this and has not ended."""
    try:
        writer = psutil.Process(sign.pid)
        has_ended = writer.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # and nobody has asked how
        is_another = writer.create_time() > sign.alive + _FRESH_S  # with the number of one that has ended
    except psutil.NoSuchProcess:
        return False
    return sign.pid != os.getpid() and not has_ended and not is_another


def write_sign(folder: Path, sign: Sign) -> None:
    """Write a rank's file.

    Raises:
        OSError: the folder is gone, forbidden ...
    """
    short = sign.reason[:_REASON_CHARS]
    text = json.dumps(asdict(sign) | {"reason": short}).encode()
    while len(text) >= _FILE_BYTES and short:  # letters outside ASCII take up to twelve bytes each
        short = short[: len(short) // 2]
        text = json.dumps(asdict(sign) | {"reason": short}).encode()
    descriptor = os.open(sign_file(folder, sign.rank), os.O_WRONLY | os.O_CREAT, 0o664)
    try:
        os.pwrite(descriptor, text.ljust(_FILE_BYTES - 1) + b"\n", 0)
    finally:
        os.close(descriptor)


def read_sign(folder: Path, rank: int) -> Sign | None:
    """What a rank last said; None where it said nothing that can be read."""
    for _ in range(2):  # a reader may come in the middle of a write
        try:
            content = json.loads(sign_file(folder, rank).read_bytes())
            return Sign(**content | {"phase": Phase(content["phase"])})
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(0.01)
    return None


def silent_ranks(folder: Path, ranks: Iterable[int], patience_s: float) -> dict[int, Sign | None]:
    """Those of `ranks` that give no new sign of life within `patience_s`, with their last one.

    Compares what a file says now with what it says later, so that clocks of nodes need not agree. Returns as soon as
    every rank has given a sign or has ended.
    """
    before = {rank: read_sign(folder, rank) for rank in ranks}
    silent = {rank: sign for rank, sign in before.items() if sign is None or sign.phase not in ENDED}
    deadline = time.monotonic() + patience_s
    while silent and time.monotonic() < deadline:
        time.sleep(min(0.2, patience_s / 10))
        now = {rank: read_sign(folder, rank) for rank in silent}
        silent = {rank: sign for rank, sign in silent.items() if now[rank] in (None, sign)}
    return silent
