"""`benchmarks/soak.py` in small: disturbed more than once, and no number is another."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak import soak, soak_anywhere
from tests.conftest import release


@release  # at each commit test_faults.py kills ranks once, and test_train.py stops them
def test_a_run_that_is_disturbed_again_and_again_ends_like_one_that_was_not(tmp_path: Path) -> None:
    result = soak(tmp_path, num_steps=20, every=8, num_ranks=2, seed=1)
    assert set(result.disturbances) == {"SIGKILL", "SIGTERM"}
    assert result.differences == []


@release
def test_so_does_one_that_is_disturbed_at_any_moment(tmp_path: Path) -> None:
    result = soak_anywhere(tmp_path, num_steps=20, every=8, num_ranks=2, num_starts=5, seed=2)
    assert sum(result.disturbances.values()) == 5
    assert result.differences == []
