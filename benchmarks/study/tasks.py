"""The data of a study: training and held-out rows as JSONL files with `instruction`, `input` and `output`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoelora.errors import ConfigError, bad_value

Row = dict[str, Any]
# Tasks that say different things of one input, and of which the instruction alone tells.
CONFLICTING: dict[str, Callable[[list[str]], str]] = {
    "Write the words in reverse order.": lambda words: " ".join(reversed(words)),
    "Sort the words by the alphabet.": lambda words: " ".join(sorted(words)),
    "Write the words in capital letters.": lambda words: " ".join(words).upper(),
    "Write the first letter of each word.": lambda words: " ".join(word[0] for word in words),
    "Write the last word.": lambda words: words[-1],
    "Write the longest word; of several the first.": lambda words: max(words, key=len),
    "Say how many letters each word has.": lambda words: " ".join(str(len(word)) for word in words),
    "Write each word backward.": lambda words: " ".join(word[::-1] for word in words),
}
_WORDS = tuple(
    """apple bridge candle desert engine forest garden harbor island jacket kitchen ladder market needle orange pencil
    quarter river saddle table umbrella village window yellow zebra anchor bottle castle dragon eagle feather
    glove""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Files:
    """Where the rows of a task lie."""

    train: Path
    held_out: Path


def task_files(name: str, folder: Path, demo: Path, shared: Path) -> Files:
    """The files of a task, written below `folder` where they have to be made.

    Args:
        name: `demo`, `qa`, `gsm8k` or `conflicting`
        folder: of the study
        demo: folder of the demo's data
        shared: folder with `commonsenseqa`, `openbookqa`, `arc_easy` and `gsm8k`

    Raises:
        ConfigError: there is no such task, or its data is not there
    """
    if name == "demo":
        train, held_out = (_there(demo / f"{part}.jsonl", "Make it: make demo") for part in ("train", "eval"))
        return Files(train, held_out)
    if name not in TASKS:
        allowed = f"one of {', '.join(['demo', *TASKS])}"
        raise bad_value("--tasks", name, allowed, "For rows of your own give --train and --eval.")
    files = Files(folder / "data" / f"{name}-train.jsonl", folder / "data" / f"{name}-eval.jsonl")
    for file, rows in zip((files.train, files.held_out), TASKS[name](shared), strict=True):
        _write(file, rows)
    return files


def _qa(shared: Path) -> tuple[Iterator[Row], Iterator[Row]]:
    """Questions with their choices in the input, the right one as output."""

    def rows(*names: str) -> Iterator[Row]:
        for row in _read(shared, *names):
            yield row | {"input": "\n".join(f"- {choice}" for choice in row["choices"])}

    train = rows("commonsenseqa/train.jsonl", "openbookqa/train.jsonl", "arc_easy/train.jsonl")
    return train, rows("commonsenseqa/dev.jsonl", "arc_easy/dev.jsonl")


def _gsm8k(shared: Path) -> tuple[Iterator[Row], Iterator[Row]]:
    return _read(shared, "gsm8k/train.jsonl"), _read(shared, "gsm8k/test.jsonl")


def _conflicting(_: Path) -> tuple[Iterator[Row], Iterator[Row]]:
    """Every task on every input; no held-out input is trained on."""
    rng, inputs = random.Random(0), []
    while len(inputs) < 500:
        words = rng.sample(_WORDS, rng.randint(3, 6))
        if words not in inputs:
            inputs.append(words)

    def rows(some: list[list[str]]) -> Iterator[Row]:
        for words in some:
            for instruction, answer in CONFLICTING.items():
                yield {"instruction": instruction, "input": " ".join(words), "output": answer(words)}

    return rows(inputs[50:]), rows(inputs[:50])


TASKS: dict[str, Callable[[Path], tuple[Iterator[Row], Iterator[Row]]]] = {
    "qa": _qa,
    "gsm8k": _gsm8k,
    "conflicting": _conflicting,
}


def _read(folder: Path, *names: str) -> Iterator[Row]:
    for name in names:
        with _there(folder / name, "Give the folder that has it: --data").open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _there(file: Path, remedy: str) -> Path:
    if not file.is_file():
        raise ConfigError(f"There is no {file}. {remedy}.")
    return file


def _write(file: Path, rows: Iterable[Row]) -> None:
    """Keep the three keys that are learned of; the file is there whole or not at all."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for row in rows:
            kept = {key: row.get(key, "") for key in ("instruction", "input", "output")}
            out.write(json.dumps(kept, ensure_ascii=False) + "\n")
    partial.replace(file)
