"""The table of docs/architecture.md has the floors that import-linter keeps apart."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows_of_page() -> dict[str, int]:
    """Module or package -> number of the row that names it in its first column."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    cells = re.findall(r"^\| (`dsmoelora/.+?) \|", page, flags=re.MULTILINE)
    named = [(Path(name).stem, row) for row, cell in enumerate(cells) for name in re.findall(r"`(.+?)`", cell)]
    assert len(dict(named)) == len(named), "a file stands in two rows"
    return dict(named)


def test_the_table_has_every_file_in_the_order_of_the_floors() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [re.findall(r"\w+", layer) for layer in layers]
    rows = rows_of_page()
    assert sorted(rows) == sorted(name for floor in floors for name in floor)
    for upper, lower in pairwise(floors):
        assert max(rows[name] for name in upper) < min(rows[name] for name in lower), f"{upper} is above {lower}"
