"""What a run leaves in its folder, by name, and `metrics.jsonl` as it is read again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
DEEPSPEED_FILE = "deepspeed.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
ORIGIN_FILE = "ORIGIN"  # of a run that began from a checkpoint of another one: its path
DONE_FILE = "DONE"
FAILED_FILE = "FAILED"  # of a run that cannot succeed as it is, with the reason


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return read_json_lines(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a line that a crash cut off is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n"):  # text has more that ends a line, which may be part of a value
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # of JSON or of UTF-8
            logger.warning("%s: dropped a line that is no JSON: %.60r", path, line)
    return rows
