"""Rows of tasks, in files and a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from dsmoelora.config import DataSource

SIZES = {"a": 7, "b": 13, "c": 9}


def write(path: Path, rows: list[Any]) -> DataSource:
    """JSON lines; strings are written as they are."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return DataSource(str(path))


def task(question: str, answer: str = "yes") -> dict[str, Any]:
    """An instruction and its output."""
    return {"instruction": question, "output": answer}


def three_sources(folder: Path) -> list[DataSource]:
    """Two files and a saved folder, of `SIZES`."""
    for name, size in SIZES.items():
        rows = [task(f"{name}{i}", "x" * (1 + i * 5 % 11)) for i in range(size)]
        if name == "c":
            datasets.Dataset.from_list(rows).save_to_disk(folder / name)
        else:
            write(folder / f"{name}.jsonl", rows)
    return [DataSource(str(folder / name)) for name in ("a.jsonl", "b.jsonl", "c")]
