"""What is known of a row: a file each, so that the benchmark can stop and go on, and its table be made again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.planner.rows import ROWS
from dsmoelora.errors import ConfigError


class Cells:
    """A folder of measurements.

    Args:
        folder: of the files
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, kind: str) -> dict[str, Any] | None:
        """What was measured of a row; None where it was not.

        Raises:
            ConfigError: it was measured with other settings than the row has now
        """
        file = self._file(name, kind)
        if not file.exists():
            return None
        cell = json.loads(file.read_text(encoding="utf-8"))
        if cell["settings"] != _plain(ROWS[name].settings()):
            raise ConfigError(f"{file} was measured with other settings of {name!r}. Take it away, and measure again.")
        return dict(cell["found"])

    def write(self, name: str, kind: str, setting: str, found: dict[str, Any]) -> None:
        """Keep it, with what it was measured on."""
        cell = {"row": name, "on": setting, "found": found, "settings": _plain(ROWS[name].settings())}
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "partial"
        partial.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._file(name, kind))

    def settings(self, kind: str, names: Iterable[str]) -> list[str]:
        """Machines that rows were measured on, each once."""
        files = [self._file(name, kind) for name in names]
        return sorted({json.loads(file.read_text(encoding="utf-8"))["on"] for file in files if file.exists()})

    def _file(self, name: str, kind: str) -> Path:
        words = "".join(one if one.isalnum() or one == "_" else " " for one in name).split()
        return self._folder / f"{'-'.join(words)}.{kind}.json"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them."""
    return dict(json.loads(json.dumps(settings)))
