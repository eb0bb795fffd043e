"""`python -m benchmarks.compose` on a tiny model: every arm runs once, and the table is of what they did."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import compose
from tests.helpers import tiny_llama


def write_rows(file: Path, count: int) -> None:
    rows = [
        {"task": ("gcd", "spell_backward")[n // 2 % 2], "instruction": f"Say {n}.", "input": "", "output": str(n)}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_arms_run_once_and_a_second_start_prints_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compose, "ROOT", tmp_path)
    model = tiny_llama(tmp_path / "model", num_hidden_layers=6)
    write_rows(tmp_path / "train.jsonl", 40)
    write_rows(tmp_path / "eval.jsonl", 12)
    sizes = ["--steps", "4", "--gate-steps", "4", "--batch-size", "2", "--eval-rows", "12", "--seeds", "0", "1"]
    argv = ["--model", str(model), "--demo", str(tmp_path), *sizes]
    compose.main(argv)
    said = capsys.readouterr().out
    table = said[said.index("| |") :]
    rows = {row.split("|")[1].strip(): row for row in table.splitlines()[2:] if row}
    assert list(rows) == [arm.name for arm in compose._ARMS]
    losses = {name: re.findall(r"(\d\.\d{3}) \(", row) for name, row in rows.items()}
    assert all(len(of_halves) == 3 for of_halves in losses.values())
    assert len(set(map(tuple, losses.values()))) > len(losses) // 2, "arms differ"

    compose.main(argv)
    again = capsys.readouterr().out
    assert again[again.index("| |") :] == table
    assert not re.search(r"^seed ", again, re.MULTILINE), "nothing ran"

    with pytest.raises(SystemExit, match=r"other settings\. Take another --name"):
        compose.main([*argv, "--gate-steps", "5"])
