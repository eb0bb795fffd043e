"""A small study: its model, its rows, its task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks.study.cells import Task
from benchmarks.study.tasks import task_files
from tests.helpers import tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A model of six layers, 160 rows to learn from, 40 that are held out."""
    folder = tmp_path_factory.mktemp("study")
    found = {"model": tiny_llama(folder / "model", num_hidden_layers=6, initializer_range=0.1)}
    files = task_files("conflicting", folder, folder, folder)
    for name, file, count in (("train", files.train, 160), ("held_out", files.held_out, 40)):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield found


@pytest.fixture
def task(tmp_path: Path, material: dict[str, Path]) -> Task:
    """Two layers of six are adapted; 8 steps of 4 rows, 12 held-out rows."""
    sizes = {"num_steps": 8, "batch_size": 4, "eval_rows": 12, "max_length": 256}
    settings: dict[str, Any] = {
        **sizes,
        "depth": "third",
        "dtype": "fp32",
        "seeds": (0, 1),
        "rate_seeds": (0, 1),
        "template": None,
    }
    return Task(tmp_path / "study" / "conflicting", **material, **settings)
