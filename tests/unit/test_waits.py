"""What takes long is said."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.signs_of_life import waits
from dsmoelora.signs_of_life.waits import num_bytes, waiting_for, watching


def test_a_long_wait_is_said_and_since_when(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(waits, "FIRST_WORD_S", 0.05)
    names = iter(("Godot", "his boots"))
    with waiting_for(lambda: next(names)):
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["Waiting for Godot, since 0 s.", "Waiting for his boots, since 0 s."]


@pytest.mark.parametrize("speaks", [True, False])
def test_a_short_wait_is_not(speaks: bool, caplog: pytest.LogCaptureFixture) -> None:
    with waiting_for(lambda: "nothing", speaks):
        pass
    assert not caplog.messages


def test_files_that_grow_are_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LOOK_EVERY_S", 0.02)
    beats: list[int] = []

    def wait_for_beats(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(beats) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    with watching(lambda: num_bytes(tmp_path), lambda: beats.append(1)):
        wait_for_beats(1)
        time.sleep(0.2)
        assert len(beats) == 1, "nothing grows"
        for count in (2, 3):
            with (tmp_path / "rows.arrow").open("a") as file:
                file.write("a row")
            wait_for_beats(count)
    assert len(beats) == 3


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_read_just_now_is_left_out(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a folder that was there when its own was listed, and has been renamed since."""
    for name in ("there", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.arrow").write_text("a row")
    list_folder = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "gone":
            raise OSError(number, os.strerror(number), str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert num_bytes(tmp_path) == len("a row")
    assert num_bytes(tmp_path / "nowhere") == 0
