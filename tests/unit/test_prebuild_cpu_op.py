"""Locks of the operator's build: a dead one goes, a living one stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.prebuild_cpu_op import OP_NAME, extensions_dir, is_built, prebuild, remove_dead_lock


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock as torch makes it, of a builder that is gone."""
    path = tmp_path / OP_NAME / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_lock_of_a_dead_builder_is_removed_and_said_so(
    lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remove_dead_lock(tmp_path)
    assert not lock.exists()
    assert str(lock) in capsys.readouterr().out
    assert not remove_dead_lock(tmp_path)


def test_lock_of_a_living_builder_stays(lock: Path, tmp_path: Path) -> None:
    held = os.open(lock, os.O_RDONLY)  # torch keeps the lock open as long as it builds
    try:
        assert not remove_dead_lock(tmp_path)
        assert lock.exists()
    finally:
        os.close(held)


def test_built_means_compiled_and_not_locked(lock: Path, tmp_path: Path) -> None:
    (tmp_path / OP_NAME / f"{OP_NAME}.so").touch()
    assert not is_built(tmp_path)
    prebuild(tmp_path)  # finds the compiled file once the dead lock is away, and builds nothing
    assert is_built(tmp_path)
    assert not (tmp_path / OP_NAME / "build.ninja").exists()


def test_folder_is_the_one_that_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_dir() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extensions_dir().parent == tmp_path / "torch_extensions"
