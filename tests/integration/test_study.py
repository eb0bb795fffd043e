"""`python -m benchmarks.study`, with processes of its own: a study from its data to table and curves, and once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from tests.helpers import tiny_llama


def test_a_study_runs_and_typed_again_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of the worker, which is a true start
    model = tiny_llama(tmp_path / "model", num_hidden_layers=3)
    sizes = ["--steps", "2", "--batch-size", "2", "--eval-rows", "8", "--seeds", "0", "--jobs", "1"]
    argv = ["--tasks", "conflicting", "--arms", "lora", "--model", str(model), *sizes]
    study.main(argv)
    said = capfd.readouterr().out
    assert said.count("held-out loss") >= 4 + 2 and "| lora |" in said
    cells = sorted((tmp_path / ".cache/study/study/conflicting/lora").glob("lr*/results.json"))
    before = {file: file.read_bytes() for file in cells}
    assert len(cells) >= 4

    pytest.importorskip("matplotlib")
    study.main([*argv, "--table", "--plot", str(tmp_path / "study.png")])
    assert "| lora |" in capfd.readouterr().out
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert {file: file.read_bytes() for file in cells} == before


def test_what_is_not_there_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(
        SystemExit, match=r"error: There is no .*gsm8k/train\.jsonl\. Give the folder that has it: --data"
    ):
        study.main(["--tasks", "gsm8k", "--data", str(tmp_path)])
