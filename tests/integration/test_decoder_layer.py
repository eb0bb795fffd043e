"""MiLoRA by whole command lines: planned, trained, gone on with, evaluated, asked, exported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsmoelora.run.files import read_metrics
from tests.forked import Program
from tests.launched import ROOT, make_workshop

MILORA = """
adapter: {style: decoder_layer, router: prompt, pooling: attention, num_experts: 7, top_k: 3, r: 2,
          target_modules: all-linear}
losses: {balance: 0.01}
"""
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, rows, and a recipe whose adapter is that of the paper."""
    folder = make_workshop(tmp_path_factory.mktemp("milora"))
    lines = (folder / "recipe.yaml").read_text().splitlines(keepends=True)
    (folder / "recipe.yaml").write_text("".join(line for line in lines if not line.startswith("adapter")) + MILORA)
    return folder


def run(workshop: Path, program: str, *words: str | Path, fails: bool = False) -> str:
    """What a program of launch/ says."""
    wide = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = Program([str(ROOT / "launch" / program), *map(str, words)], wide)
    out, err = process.communicate(PATIENCE_S)
    assert (process.returncode != 0) == fails, f"{out}\n{err}"
    return out + err


def test_a_mixture_of_modules_goes_all_the_way(workshop: Path) -> None:
    recipe, folder = ("--config", workshop / "recipe.yaml"), workshop / "runs" / "tiny"
    plan = run(workshop, "train.py", *recipe, "--dry-run")
    assert "the 7 target modules of a decoder layer, of rank 2, 3 for a prompt" in plan
    assert "prompt of each decoder layer, balance loss 0.01" in plan
    run(workshop, "train.py", *recipe)
    whole = read_metrics(folder / "metrics.jsonl")
    assert whole[-1]["eval/loss"] < whole[0]["eval/loss"]  # type: ignore[operator]
    assert whole[1]["losses/balance"] > 0  # type: ignore[operator]
    more = ("--resume", folder / "checkpoint-3", "--run.name", "again")
    run(workshop, "train.py", *recipe, *more)
    again = read_metrics(workshop / "runs" / "again" / "metrics.jsonl")
    assert [row["loss"] for row in again[-3:]] == [row["loss"] for row in whole[-3:]]

    adapter = ("--adapter", folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors["model.layers.1.router.weight"].shape == (7, 32)
    answers = [run(workshop, "generate.py", *adapter, "--prompt", "Reverse. abc") for _ in range(2)]
    assert answers[0] == answers[1]
    run(workshop, "evaluate.py", *adapter, "--data", workshop / "eval.jsonl", "--score", "exact")
    refused = run(workshop, "export.py", *adapter, "--format", "peft", "--out", workshop / "peft", fails=True)
    assert "average for adapter.style decoder_layer, whose experts are the layers of one adapter" in refused
    out = workshop / "average"
    run(workshop, "export.py", *adapter, "--format", "average", "--data", workshop / "eval.jsonl", "--out", out)
    exported = load_file(out / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in exported.items() if ".lora_A." in name} == {2}, "one LoRA of rank R"
    assert all(torch.isfinite(value).all() for value in exported.values())
