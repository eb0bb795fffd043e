"""launch/train.py and launch/generate.py on a tiny model, as a user runs them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsmoelora.callbacks import read_metrics
from dsmoelora.cli import parse_command
from launch import generate, train
from tests.conftest import PoolFactory
from tests.helpers import tiny_llama
from tests.helpers_distributed import free_port

ROOT = Path(__file__).parents[2]
COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")

RECIPE = """
run: {{name: tiny, dir: {folder}/runs, seed: 3}}
model: {{path: {folder}/model, dtype: fp32}}
adapter: {{num_experts: 4, top_k: 2, r: 2, lora_dropout: 0.1, target_modules: all-linear}}
optim: {{lr: 1e-2, warmup_steps: 1}}
data: {{train: [{{path: {folder}/train.jsonl}}], eval: [{{path: {folder}/eval.jsonl}}], max_length: 64}}
train: {{max_steps: 6, batch_size: 4, micro_batch_size: 1, eval_every: 4, save_every: 3, num_samples: 2,
         sample_max_new_tokens: 4}}
"""


def write_rows(path: Path, count: int, rng: random.Random) -> None:
    letters = [rng.sample("abcdef", rng.randint(2, 5)) for _ in range(count)]
    rows = [{"instruction": "Reverse.", "input": "".join(word), "output": "".join(word[::-1])} for word in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and recipe.yaml."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny_llama(folder / "model", hidden_size=32, intermediate_size=64)
    rng = random.Random(0)
    write_rows(folder / "train.jsonl", 30, rng)
    write_rows(folder / "eval.jsonl", 5, rng)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


def run_command(*argv: str) -> None:
    """`launch/train.py` in a process that has met the others already."""
    train.run(parse_command(list(argv)))


@pytest.fixture(scope="module")
def trained(workshop: Path, worker_pool: PoolFactory) -> Path:
    """The run folder after six steps on two ranks."""
    worker_pool(2).run(run_command, "--config", str(workshop / "recipe.yaml"))
    return workshop / "runs" / "tiny"


def test_a_run_leaves_everything_behind(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    expected = {"recipe.yaml", "deepspeed.json", "metrics.jsonl", "tensorboard", "adapter"}
    assert names == expected | {"checkpoint-3", "checkpoint-6"}
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 4, 6]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]  # type: ignore[operator]
    assert rows[3]["canary/dead_tensors"] == 0


def test_a_resumed_run_repeats_the_interrupted_one_to_the_last_bit(
    workshop: Path, trained: Path, worker_pool: PoolFactory
) -> None:
    broken = workshop / "broken" / "tiny"
    shutil.copytree(trained, broken)
    for folder in ("checkpoint-6", "adapter"):
        shutil.rmtree(broken / folder)
    argv = ("--config", str(workshop / "recipe.yaml"), "--run.dir", str(broken.parent), "--resume", "auto")
    worker_pool(2).run(run_command, *argv)
    straight, resumed = (read_metrics(folder / "metrics.jsonl") for folder in (trained, broken))
    for row, again in zip(straight, resumed, strict=True):
        assert [row.get(name) for name in COMPARED] == [again.get(name) for name in COMPARED]
    wanted, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, broken))
    assert wanted.keys() == found.keys()
    assert all(bool((wanted[name] == found[name]).all()) for name in wanted)


def test_the_adapter_answers_without_deepspeed(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--adapter", str(trained / "adapter"), "--prompt", "abc", "--prompt", "fed", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *argv])
    generate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> abc" and "> fed" in lines


def start_ranks(*argv_of_rank: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Start launch/train.py once a rank, as a launcher would, and wait for all."""
    num_ranks = str(len(argv_of_rank))
    shared = {
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "train.py"), f"--local_rank={rank}", *argv],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, argv in enumerate(argv_of_rank)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not list(Path("/dev/shm").glob(f"*_{shared['MASTER_PORT']}_*")), "a run leaves shared memory behind"
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *said) for p, said in zip(processes, outputs, strict=True)
    ]


def test_all_ranks_end_when_the_run_would_overwrite_another(workshop: Path, trained: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    argv = ["--config", str(workshop / "recipe.yaml")]
    first, second = start_ranks(argv, argv)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.startswith("error: ") and "holds a run already" in first.stderr
    assert len(first.stderr.splitlines()) == 1
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_an_error_on_one_rank_ends_all(workshop: Path) -> None:
    """The recipe is missing on rank 1, as on a node whose disk is not shared."""
    first, second = start_ranks(["--config", str(workshop / "recipe.yaml")], ["--config", "nowhere.yaml"])
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.startswith("error: rank 1: --config nowhere.yaml: there is no such file")
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
