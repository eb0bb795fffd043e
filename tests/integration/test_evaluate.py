"""launch/evaluate.py as a user runs it: the page's commands, ranks that are killed, folders of other evaluations."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsmoelora.cli import run_guarded
from dsmoelora.config import ModelConfig
from dsmoelora.data.chat import Prompt
from dsmoelora.evaluate.marks import normalised
from dsmoelora.model import load_tokenizer
from dsmoelora.model.inputs import greedy_answers
from dsmoelora.run.files import read_metrics
from launch import evaluate
from tests.conftest import PoolFactory
from tests.integration.test_train import run_command
from tests.launched import ROOT, Ranks, make_workshop

PAGE = ROOT / "docs" / "evaluation.md"
STARTED = r"^    (?:python|torchrun --nproc-per-node 2) launch/evaluate\.py (.*)$"
COMMANDS = [one for one in re.findall(STARTED, PAGE.read_text(), flags=re.MULTILINE) if "--tasks" not in one]
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
FILES = {
    "data/gsm8k.jsonl": [{"question": "2 + 3?", "answer": "#### 5"}, {"question": "1 + 1?", "answer": "It is 2."}],
    "data/choices.jsonl": [{"question": "A letter?", "choices": ["a", "7", "the sea"], "answer": 0}],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, worker_pool: PoolFactory) -> Path:
    """A folder with a trained run and data, where the page's paths lead."""
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    worker_pool(2).run(run_command, "--config", str(folder / "recipe.yaml"), "--run.name", "demo")
    (folder / "data" / "demo").mkdir(parents=True)
    shutil.copy(folder / "eval.jsonl", folder / "data" / "demo" / "eval.jsonl")
    for path, rows in FILES.items():
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def there(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """The program in this process, as plain `python` would start it."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *argv])
        for name in ENVIRONMENT:
            patch.setenv(name, "")  # to be put back as it was
            patch.delenv(name)
        return run_guarded(evaluate.main)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    assert run(monkeypatch, *shlex.split(command), "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "base" in said and "adapter" in said and "results.jsonl" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["count"] for row in summary["scores"]] == [len(results(tmp_path / "out"))] * len(summary["scores"])
    drawn = {path.name for path in (tmp_path / "out").glob("routing.*")}
    assert drawn == ({"routing.json", "routing.png"} if "--routing" in command else set())


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 4


def test_loss_is_what_training_said_before_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ("--adapter", "runs/demo/adapter", "--data", "eval.jsonl", "--score", "loss", "--data.max_length", "64")
    assert run(monkeypatch, *argv, "--out", str(tmp_path)) == 0
    (row,) = json.loads((tmp_path / "summary.json").read_text())["scores"]
    said = [line["eval/loss"] for line in read_metrics(Path("runs/demo/metrics.jsonl")) if "eval/loss" in line]
    assert row["base"]["value"] == pytest.approx(said[0], rel=1e-5)
    assert row["adapter"]["value"] == pytest.approx(said[-1], rel=1e-5)
    assert row["adapter"]["low"] < row["adapter"]["value"] < row["adapter"]["high"]


def test_a_killed_rank_is_named_and_another_number_of_ranks_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"instruction": "Say it.", "input": "ab" * (1 + k % 9), "output": "ba"} for k in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--adapter", "runs/demo/adapter", "--data", str(data), "--score", "exact", "--max-new-tokens", "16"]
    argv += ["--batch-size", "2"]
    assert run(monkeypatch, *argv, "--out", str(tmp_path / "straight")) == 0

    broken = tmp_path / "broken"
    with Ranks(*([*argv, "--out", str(broken)] for _ in range(2)), program="evaluate.py") as ranks:
        deadline = time.monotonic() + 120
        while len(lines_of(broken)) < 3:
            assert all(process.poll() is None for process in ranks.processes), "a rank has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        (survivor,) = ranks.finish([0])
    assert survivor.returncode == 1
    assert "rank 1" in survivor.stderr and "start again with the same command" in survivor.stderr
    kept = lines_of(broken)
    assert 3 <= len(kept) < 30, "it was killed in the middle"
    with next((broken / "parts").glob("rank-*.jsonl")).open("a") as part:
        part.write('{"stage": "base", "ba')  # as a full disk or a kill would leave it

    assert run(monkeypatch, *argv, "--out", str(broken)) == 0
    assert (broken / "results.jsonl").read_bytes() == (tmp_path / "straight" / "results.jsonl").read_bytes()
    again = lines_of(broken)
    assert len(again) == 30 and set(kept) < set(again), "no batch was done twice"
    assert [row["row"] for row in results(broken)] == list(range(1, 31))


def lines_of(folder: Path) -> list[str]:
    """The whole lines of finished batches."""
    found = [line for file in (folder / "parts").glob("*.jsonl") for line in file.read_text().splitlines()]
    return [line for line in found if line.endswith("]}")]


def test_a_folder_of_another_evaluation_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    argv = ("--adapter", "runs/demo/adapter", "--out", str(tmp_path), "--data", "eval.jsonl", "--score")
    assert run(monkeypatch, *argv, "loss") == 0
    before = results(tmp_path)
    assert run(monkeypatch, *argv, "exact") == 1
    assert "holds another evaluation: its score is 'loss', not 'exact'. Name another folder" in capsys.readouterr().err
    assert run(monkeypatch, *argv, "loss", "--num-samples", "2") == 1
    assert "its num_rows is 5, not 2" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(Path("train.jsonl").read_text().splitlines(keepends=True)[0] * 5)
    assert run(monkeypatch, *argv[:4], "--data", str(other), "--score", "loss") == 1
    said = capsys.readouterr().err
    assert "its data is not the same. Name another folder with --out" in said and "sha256" not in said
    assert run(monkeypatch, *argv, "loss", "--base-only", "--base", str(another_base(tmp_path / "base"))) == 1
    assert "its base is not the same" in capsys.readouterr().err
    assert results(tmp_path) == before
    assert run(monkeypatch, *argv, "loss", "--base-only") == 0 and results(tmp_path) == before, "nothing is lost"
    copy = shutil.copytree("model", tmp_path / "copy")
    assert run(monkeypatch, *argv, "loss", "--base", str(copy)) == 0  # all is done: the summary comes again
    assert "left" not in capsys.readouterr().out


def another_base(folder: Path) -> Path:
    """One that differs in a single tensor."""
    shutil.copytree("model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_several_files_have_a_line_each_and_one_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ("--adapter", "runs/demo/adapter", "--score", "loss", "--adapter-only", "--out", str(tmp_path))
    assert run(monkeypatch, *argv, "--data", "eval.jsonl", "--data", "train.jsonl") == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert [(row["data"], row["count"]) for row in rows] == [("eval.jsonl", 5), ("train.jsonl", 30), ("all", 35)]
    assert all("base" not in row for row in rows)
    tokens = {
        name: sum(r["num_tokens"] for r in results(tmp_path) if r["data"] == name)
        for name in ("eval.jsonl", "train.jsonl")
    }
    mean = sum(row["adapter"]["value"] * tokens[row["data"]] for row in rows[:2]) / sum(tokens.values())
    assert rows[2]["adapter"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("init", ["kaiming", "loftq"])
@pytest.mark.usefixtures("computes_in_fp32")
def test_a_base_in_four_bits_is_scored_as_training_scores_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, worker_pool: PoolFactory, workshop: Path, capsys: Any, init: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")
    train = ("--config", str(workshop / "recipe.yaml"), "--model.quantize", "nf4", "--run.dir", str(tmp_path))
    train += ("--adapter.init", init)
    worker_pool(2).run(run_command, *train)
    said = [line for line in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if "eval/loss" in line]
    argv = ("--adapter", str(tmp_path / "tiny" / "adapter"), "--data", "eval.jsonl", "--score", "loss")
    values = {}
    for quantize in ("nf4", "none"):
        out = tmp_path / quantize
        assert run(monkeypatch, *argv, "--quantize", quantize, "--data.max_length", "64", "--out", str(out)) == 0
        (row,) = json.loads((out / "summary.json").read_text())["scores"]
        values[quantize] = (row["base"]["value"], row["adapter"]["value"])
        assert ("was trained on its base in 4 bits" in capsys.readouterr().err) == (quantize == "none")
    assert values["nf4"][1] == pytest.approx(said[-1]["eval/loss"], rel=1e-5)
    is_base = init == "kaiming"  # what training begins with; with loftq experts make up for something already
    assert (values["nf4"][0] == pytest.approx(said[0]["eval/loss"], rel=1e-5)) == is_base
    assert abs(values["none"][0] - values["nf4"][0]) > 1e-4


CHOICES = [
    {"question": f"Which of {a} and {b}?", "choices": [a, b, a + b], "answer": k % 3}
    for k, (a, b) in enumerate(("ab", "cd", "ef", "ba", "dc", "fe", "ac"))
]


@pytest.mark.parametrize("ep_size", ["1", "2"])
def test_a_run_reports_the_choices_that_its_models_make(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, worker_pool: PoolFactory, workshop: Path, ep_size: str
) -> None:
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    argv = ("--config", str(workshop / "recipe.yaml"), "--train.eval_score", "choice")
    argv += ("--data.eval", f"[{{path: {data}}}]", "--data.max_length", "128")
    worker_pool(2).run(run_command, *argv, "--run.dir", str(tmp_path), "--parallel.ep_size", ep_size)
    said = [line for line in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if "eval/loss" in line]
    assert run(
        monkeypatch, "--adapter", str(tmp_path / "tiny" / "adapter"), "--data", str(data), "--score", "choice"
    ) == 0  # fmt: skip
    folder = tmp_path / "tiny" / "evaluations" / "choices-choice"
    (summed,) = json.loads((folder / "summary.json").read_text())["scores"]
    for line, who in ((said[0], "base"), (said[-1], "adapter")):
        assert line["eval/choice"] == pytest.approx(summed[who]["value"])
        assert "eval/choice_per_byte" not in line, "the letters are all of one byte"
    assert 0 < summed["base"]["value"] < 1, "some are right and some are wrong"


def test_a_run_reports_the_answers_that_are_right(tmp_path: Path, worker_pool: PoolFactory, workshop: Path) -> None:
    """Wanted of two rows in five is what the base answers: all that is known of it before the first step."""
    tokenizer = load_tokenizer(ModelConfig(str(workshop / "model")))
    model = AutoModelForCausalLM.from_pretrained(workshop / "model").eval()
    rows: list[dict[str, str]] = []
    for length in range(1, 30):
        question = "x" * length
        (answer,) = greedy_answers(model, tokenizer, [Prompt([{"role": "user", "content": question}])], 4)
        if normalised(answer) and len(rows) < 5:
            rows.append({"instruction": question, "output": answer if len(rows) < 2 else f"{answer} it is"})
    assert len(rows) == 5
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--config", str(workshop / "recipe.yaml"), "--train.eval_score", "exact")
    argv += ("--data.eval", f"[{{path: {data}}}]")
    worker_pool(2).run(run_command, *argv, "--run.dir", str(tmp_path), "--train.max_steps", "1")
    said = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert said[0]["eval/exact"] == pytest.approx(2 / 5)
    assert "eval/exact" in said[1] and "eval/choice" not in said[1]
