"""launch/evaluate.py --tasks: lm-evaluation-harness with our ranks, on files alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.errors import ConfigError, DataError
from dsmoelora.evaluate.harness import as_json, find_tasks, from_json
from launch import evaluate
from tests.helpers import tiny_llama
from tests.launched import ROOT, Ranks
from tests.unit.test_export import CONFIG, make_adapter

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
(TASK,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
(COMMAND,) = re.findall(r"launch/evaluate\.py (.*--tasks mine.*)$", PAGE, flags=re.MULTILINE)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page's command names; the model has room for few documents' mistakes."""
    monkeypatch.chdir(tmp_path)
    make_adapter(tiny_llama(tmp_path / "base", max_position_embeddings=512), tmp_path / "runs" / "demo" / "adapter")
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    (tmp_path / "data" / "tasks" / "mine.yaml").write_text(TASK)
    words = ["fig", "stone", "walk", "red", "seven", "no", "é"]
    rows = [
        {"question": f"{a}?", "choices": [a, b, a + b], "answer": k % 3} for k, (a, b) in enumerate(pairwise(words))
    ]
    (tmp_path / "data" / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_two_ranks_have_the_numbers_of_one(there: Path) -> None:
    found = {}
    for num_ranks in (1, 2):
        out = there / f"out-{num_ranks}"
        with Ranks(*([*COMMAND.split(), "--out", str(out)] for _ in range(num_ranks)), program="evaluate.py") as ranks:
            done = ranks.finish()
        assert [one.returncode for one in done] == [0] * num_ranks, done[0].stderr
        found[num_ranks] = json.loads((out / "tasks.json").read_text())
        assert "mine" in done[0].stdout and "acc_norm" in done[0].stdout
        said = (done[0].stdout + done[0].stderr).splitlines()
        assert [line for line in said if "lm_eval" in line and "WARNING" in line] == []
    assert found[1] == found[2] and found[1].keys() == {"base", "adapter"}
    values = {score["metric"]: score["value"] for score in found[1]["base"]}
    assert values.keys() == {"acc", "acc_norm"} and any(0 < value < 1 for value in values.values())


def test_objects_pass_between_ranks_as_they_are() -> None:
    given = {("acc", "none"): [1.0, (2, "a"), None], "x": {"y": [True]}}
    assert from_json(json.loads(json.dumps(as_json(given)))) == given


def test_tasks_that_cannot_be_had(there: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks is 'no_such_task', but it must be names of tasks"):
        find_tasks(["no_such_task"], None)
    (there / "data" / "choices.jsonl").unlink()
    with pytest.raises(DataError, match=r"--tasks mine: its data cannot be had \(.*write a task on files of your own"):
        find_tasks(["mine"], there / "data" / "tasks")


def test_without_the_extra(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dsmoelora\[eval\]'"):
        evaluate.parse_options(["--adapter", "runs/demo/adapter", "--tasks", "mine"])


def test_options(there: Path, tmp_path: Path) -> None:
    options: Any = evaluate.parse_options(["--adapter", "runs/demo/adapter", "--tasks", "a,b", "--base-only"])
    assert options.tasks == ["a", "b"] and options.stages == ("base",)
    assert options.out == Path("runs/demo/evaluations/a-b")
    other = make_adapter(tmp_path / "base", tmp_path / "prompt", replace(CONFIG, router="prompt"))
    assert evaluate.parse_options(["--adapter", str(other), "--tasks", "a", "--base-only"]).tasks == ["a"]
