"""What an evaluation keeps on disk while it goes on: after a kill the next start goes on where it was.

    <out>/evaluation.json          what is evaluated; another evaluation may not go on here
    <out>/parts/rank-00003.jsonl   a line for each batch that this rank has finished
    <out>/results.jsonl            in the end: a line for each row
    <out>/summary.json             and what comes of them

Batches are the same for any number of ranks, so whoever starts again may be more or fewer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoelora.errors import ConfigError
from dsmoelora.evaluate.scores import Outcome
from dsmoelora.run.files import read_json_lines

IDENTITY_FILE, PARTS, RESULTS_FILE, SUMMARY_FILE = "evaluation.json", "parts", "results.jsonl", "summary.json"
DIGEST = "sha256:"  # before what stands for a content; nobody is told its digits


class Store:
    """The folder of one evaluation.

    Args:
        folder: seen by all ranks
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, or make sure that it belongs to this very evaluation (one rank).

        Raises:
            ConfigError: it belongs to another one, or cannot be written
        """
        file = self.folder / IDENTITY_FILE
        remedy = "Name another folder with --out, or take this one away."
        try:
            known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else identity
            self._check(known, identity, remedy)
            (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
            self._write(IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {self.folder} cannot be written ({error.strerror}). {remedy}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} is damaged: {error}. {remedy}") from None

    def _check(self, known: Mapping[str, Any], identity: Mapping[str, Any], remedy: str) -> None:
        other = next((key for key in identity if known.get(key) != identity[key]), None)
        if other is not None:
            was, now = known.get(other), identity[other]
            differs = "not the same" if str(now).startswith(DIGEST) else f"{was!r}, not {now!r}"
            raise ConfigError(f"{self.folder} holds another evaluation: its {other} is {differs}. {remedy}")

    def add(self, stage: str, batch: int, outcomes: Sequence[Outcome], rank: int) -> None:
        """Keep what came of a batch."""
        line = json.dumps({"stage": stage, "batch": batch, "outcomes": outcomes})
        file = self.folder / PARTS / f"rank-{rank:05}.jsonl"
        with file.open("ab+") as part:  # a kill may have torn the last line
            part.seek(max(0, part.seek(0, os.SEEK_END) - 1))
            is_torn = part.read(1) not in (b"", b"\n")
            part.write(("\n" * is_torn + line + "\n").encode())

    def finished(self, stage: str) -> dict[int, list[Outcome]]:
        """Outcomes of the batches that some rank has finished."""
        found = {}
        for file in sorted((self.folder / PARTS).glob("rank-*.jsonl")):
            for line in read_json_lines(file):
                if line["stage"] == stage:
                    found[line["batch"]] = line["outcomes"]
        return found

    def write_results(self, rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """Write what came of everything; older files of these names are replaced."""
        self._write(RESULTS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._write(SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        part = self.folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / name)
