"""The table of docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_named_test_exists() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:unit|distributed|integration|slurm)/\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for file, test in named:
        source = (TESTS / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"
