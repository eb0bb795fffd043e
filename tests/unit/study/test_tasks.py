"""Tasks of `benchmarks/study`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.study.tasks import CONFLICTING, task_files
from dsmoelora.errors import ConfigError


def test_conflicting_tasks_say_different_things_of_one_input(tmp_path: Path) -> None:
    files = task_files("conflicting", tmp_path, tmp_path, tmp_path)
    train, held_out = ([json.loads(line) for line in file.read_text().splitlines()] for file in vars(files).values())
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    for rows in (train, held_out):
        of_input: dict[str, list[str]] = {}
        for row in rows:
            of_input.setdefault(row["input"], []).append(row["output"])
        assert {len(outputs) for outputs in of_input.values()} == {len(CONFLICTING)}
        assert all(len(set(outputs)) >= len(CONFLICTING) - 2 for outputs in of_input.values())
    answers = [answer(["desert", "apple", "ladder"]) for answer in CONFLICTING.values()]
    assert answers == [
        *("ladder apple desert", "apple desert ladder", "DESERT APPLE LADDER", "d a l", "ladder", "desert", "6 5 6"),
        "tresed elppa reddal",
    ]


def test_questions_have_their_choices_in_the_input(tmp_path: Path) -> None:
    row = {"instruction": "Why?", "input": "", "output": "so", "choices": ["so", "no"], "answer": 0}
    for name in ("commonsenseqa/train", "openbookqa/train", "arc_easy/train", "commonsenseqa/dev", "arc_easy/dev"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(row) + "\n")
    files = task_files("qa", tmp_path / "study", tmp_path, tmp_path)
    expected = {"instruction": "Why?", "input": "- so\n- no", "output": "so"}
    for file, count in ((files.train, 3), (files.held_out, 2)):
        assert [json.loads(line) for line in file.read_text().splitlines()] == count * [expected]
    with pytest.raises(ConfigError, match=r"There is no .*gsm8k"):
        task_files("gsm8k", tmp_path / "study", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="--tasks is 'mine', but it must be one of demo, qa, gsm8k, conflicting"):
        task_files("mine", tmp_path, tmp_path, tmp_path)
