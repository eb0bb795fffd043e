"""Checkpoints when something is damaged, killed, full or forbidden; and which of them stay."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.adapters import Factor
from dsmoelora.checkpoint import folders, training_state
from dsmoelora.checkpoint.index import read_index
from dsmoelora.checkpoint.rank_file import rank_file_name
from dsmoelora.checkpoint.training_state import ShardState, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from dsmoelora.errors import CheckpointError, UserError
from dsmoelora.optim.rows import Segment, Trainable
from tests.checkpoints import (
    ADAM,
    PARAMETERS,
    assert_equal_to_the_bit,
    assert_untouched,
    load,
    names_below,
    newest,
    on_ranks,
    save,
    saved_run,
)
from tests.shardings import per_parameter, random_numbers

# ---- damage is found, named, and an older checkpoint is used


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def another_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 2', '"version": 99'))


DAMAGES = [
    ("rank-00001.safetensors", flip_a_bit, "does not match its checksum"),
    ("rank-00000.safetensors", truncate, r"has \d+ bytes instead of \d+"),
    ("rank-00001.safetensors", Path.unlink, "cannot be read"),
    ("index.json", Path.unlink, "cannot be read"),
    ("index.json", truncate, "not valid JSON"),
    ("index.json", flip_a_bit, "JSON|checksum|index of a"),
    ("index.json", another_version, "format version 99, known is 2"),
    ("index.json", lambda path: path.write_text("[]"), "index of a"),
    ("index.json", lambda path: path.write_bytes(b"\xff\xfe"), "not valid JSON"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_damage_is_reported_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    numbers = saved_run(tmp_path)
    damaged = tmp_path / "checkpoint-100"
    damage(damaged / name)
    layout = per_parameter(PARAMETERS, 3)

    for outcome in load(damaged, layout, ADAM)[0]:
        assert isinstance(outcome, CheckpointError)
        assert all(part in str(outcome) for part in (str(damaged), name, "--resume auto"))
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == tmp_path / "checkpoint-50"
    assert len(caplog.messages) == 1, "one warning from rank 0"
    assert caplog.messages[0].startswith(f"{damaged} is damaged and skipped: {name}")
    assert caplog.messages[0].endswith(f"{tmp_path / 'checkpoint-50'} is used instead.")
    assert re.search(reason, caplog.messages[0])
    assert_equal_to_the_bit(load(tmp_path / "checkpoint-50", layout, ADAM)[1], layout, numbers[50])


def test_every_flipped_bit_of_the_index_is_noticed(tmp_path: Path) -> None:
    saved_run(tmp_path, (50,))
    index = tmp_path / "checkpoint-50" / "index.json"
    original, rng = index.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        index.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_index(index.parent)


def test_without_any_whole_checkpoint_there_is_none_to_go_on_from(tmp_path: Path) -> None:
    """A run must not begin anew where there are steps that somebody may mend."""
    assert newest(tmp_path / "nowhere") is None
    saved_run(tmp_path, (40, 50))
    for step in (40, 50):
        flip_a_bit(tmp_path / f"checkpoint-{step}" / "rank-00000.safetensors")
    for outcome in on_ranks(2, lambda rank: newest_whole_checkpoint(tmp_path)):
        assert isinstance(outcome, CheckpointError)
        assert "checkpoint-50 is no whole checkpoint: rank-00000" in str(outcome) and "any of 1 older" in str(outcome)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    saved_run(tmp_path, (9, 10, 100))
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


def test_folder_that_is_none_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for outcome in load(tmp_path / "checkpoint-7", per_parameter(PARAMETERS, 2), ADAM)[0]:
        assert isinstance(outcome, CheckpointError)
        assert "index.json cannot be read (No such file or directory)" in str(outcome)


# ---- a save that fails changes nothing


@pytest.mark.parametrize("full_rank", [0, 2])
def test_full_disk_on_one_rank_fails_all_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_rank: int
) -> None:
    numbers = saved_run(tmp_path)
    name = rank_file_name
    monkeypatch.setattr(training_state, "rank_file_name", lambda rank: "/dev/full" if rank == full_rank else name(rank))
    outcomes = save(tmp_path, 150, per_parameter(PARAMETERS, 3), numbers[50], keep=1)
    for rank, outcome in enumerate(outcomes):
        assert type(outcome) is (CheckpointError if rank == full_rank else UserError)
        assert "No space left on device" in str(outcome)
        assert "older checkpoints are untouched" in str(outcome)
        assert rank == full_rank or f"rank {full_rank}: " in str(outcome)
    assert_untouched(tmp_path, numbers)


@pytest.mark.parametrize("where", ["write_index", "begin", "publish"])
def test_disk_error_on_rank_0_fails_all_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    numbers = saved_run(tmp_path)

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(training_state if where == "write_index" else folders, where, refuse)
    outcomes = save(tmp_path, 150, per_parameter(PARAMETERS, 2), numbers[50], keep=1)
    assert [type(outcome) for outcome in outcomes] == [CheckpointError, UserError]
    assert "Permission denied" in str(outcomes[0])
    assert_untouched(tmp_path, numbers)


def test_failed_rename_gives_a_former_checkpoint_of_the_step_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = saved_run(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    outcomes = save(tmp_path, 100, per_parameter(PARAMETERS, 2), numbers[50])
    assert "Input/output error" in str(outcomes[0])
    assert_untouched(tmp_path, numbers)


def test_same_step_is_replaced(tmp_path: Path) -> None:
    numbers = saved_run(tmp_path)
    save(tmp_path, 100, per_parameter(PARAMETERS, 3), numbers[50], keep=2, state={"step": 100})
    assert_untouched(tmp_path, {50: numbers[50], 100: numbers[50]})


def test_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    numbers = saved_run(tmp_path, (100,))
    hidden = tmp_path / ".checkpoint-100.replaced"
    (tmp_path / "checkpoint-100").rename(hidden)
    assert newest(tmp_path) == hidden
    layout = per_parameter(PARAMETERS, 3)
    assert_equal_to_the_bit(load(hidden, layout, ADAM)[1], layout, numbers[100])
    save(tmp_path, 101, layout, numbers[100], state={"step": 101})
    assert_untouched(tmp_path, {101: numbers[100]})


def test_everything_lies_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, int] = {}  # by file: its size when it was last synced
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(descriptor: int) -> None:
        synced[str(Path(f"/proc/self/fd/{descriptor}").readlink())] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def watch_rename(self: Path, target: Path) -> Path:
        assert str(self) in synced
        for path in self.iterdir():
            before_its_own_rename = path.with_name(f".{path.name}.partial")
            assert path.stat().st_size in (synced.get(str(path)), synced.get(str(before_its_own_rename)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    saved_run(tmp_path, (50,))
    assert str(tmp_path) in synced


def test_left_overs_of_crashes_are_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    numbers = saved_run(tmp_path, (50,))
    shutil.copytree(tmp_path / "checkpoint-50", tmp_path / ".checkpoint-75.partial")
    (tmp_path / ".checkpoint-80.partial").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-50"
    save(tmp_path, 80, per_parameter(PARAMETERS, 2), numbers[50], state={"step": 80})
    assert_untouched(tmp_path, {50: numbers[50], 80: numbers[50]})


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    rng, step = random.Random(0), 0
    for _ in range(8):
        child = os.fork()
        if child == 0:
            save_until_killed(tmp_path, step)
        deadline = time.monotonic() + 20
        while not (tmp_path / f"checkpoint-{step + 3}").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = newest_whole_checkpoint(tmp_path)
        assert folder is not None
        values = torch.zeros(1 << 18)
        state = load_checkpoint(folder, [ShardState(big_run(), {"value": values})])
        assert state["step"] >= step + 3
        assert bool((values == state["step"]).all())
        step = state["step"]


def save_until_killed(root: Path, step: int) -> None:
    """Life of a child process: save one step after the other, with the step as every value."""
    end = time.monotonic() + 30  # should the parent die first
    try:
        while time.monotonic() < end:
            step += 1
            values = torch.full((1 << 18,), float(step))
            save_checkpoint(root, step, [ShardState(big_run(), {"value": values})], {"step": step}, keep=2)
    finally:
        os._exit(1)


def big_run() -> list[Segment]:
    return [Segment(Trainable("proj.experts.a", "proj", Factor.A, (4, 1 << 14, 4)), 0, 1 << 18, 0)]


# ---- which checkpoints stay


def test_newest_stay(tmp_path: Path) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, 0)
    for step in (8, 9, 10, 11):
        save(tmp_path, step, per_parameter(PARAMETERS, 2), numbers, keep=2)
    assert names_below(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    save(tmp_path, 12, per_parameter(PARAMETERS, 2), numbers, keep=1)
    assert names_below(tmp_path) == ["checkpoint-12"]


def test_plainly_damaged_ones_do_not_count(tmp_path: Path) -> None:
    numbers = saved_run(tmp_path, (40, 50, 60))
    truncate(tmp_path / "checkpoint-60" / "rank-00000.safetensors")
    save(tmp_path, 70, per_parameter(PARAMETERS, 2), numbers[50], keep=2)
    assert names_below(tmp_path) == ["checkpoint-50", "checkpoint-70"]


def test_those_of_another_version_stay(tmp_path: Path) -> None:
    """Somebody may go on from them with the release that wrote them."""
    numbers = saved_run(tmp_path, (40, 50))
    index = tmp_path / "checkpoint-40" / "index.json"
    index.write_text(index.read_text().replace('"version": 2', '"version": 3'))
    save(tmp_path, 60, per_parameter(PARAMETERS, 2), numbers[50], keep=1)
    assert names_below(tmp_path) == ["checkpoint-40", "checkpoint-60"]


def test_newer_ones_and_foreign_folders_stay(tmp_path: Path) -> None:
    numbers = saved_run(tmp_path, (50, 100))
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("{}")
    save(tmp_path, 75, per_parameter(PARAMETERS, 2), numbers[50], keep=1)
    assert names_below(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-75"]


def test_one_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = saved_run(tmp_path, (50,))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "checkpoint-50":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert save(tmp_path, 60, per_parameter(PARAMETERS, 2), numbers[50], keep=1) == [tmp_path / "checkpoint-60"] * 2
    assert "checkpoint-50 could not be removed" in caplog.text


def test_a_folder_that_cannot_be_listed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new checkpoint is whole by then, and the other ranks wait."""

    def fail(*_: Any) -> None:
        raise OSError("Stale file handle")

    monkeypatch.setattr(folders, "_looks_whole", fail)
    with caplog.at_level(logging.WARNING):
        saved_run(tmp_path, (25,))
    assert names_below(tmp_path) == ["checkpoint-25"]
    assert "could not be listed: Stale file handle" in caplog.text
