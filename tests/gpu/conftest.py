"""Tests of this folder need a GPU; without one each is skipped, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NO_GPU = "torch sees no CUDA device: run `make test-gpu` on a machine with one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here `gpu`, and skip it where there is none."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
