"""launch/train.py and launch/generate.py on a tiny model, as a user runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsmoelora.cli import parse_command
from dsmoelora.metrics_file import read_metrics
from launch import generate, train
from tests.conftest import PoolFactory
from tests.launched import Ranks, make_workshop

COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and recipe.yaml."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


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
    expected = {"recipe.yaml", "deepspeed.json", "metrics.jsonl", "tensorboard", "adapter", "heartbeat"}
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


def start_ranks(*argv_of_rank: list[str]) -> list[subprocess.CompletedProcess]:
    """Run launch/train.py once a rank, as a launcher would, and wait for all."""
    with Ranks(*argv_of_rank) as ranks:
        said = ranks.finish()
        assert not list(Path("/dev/shm").glob(f"*_{ranks.port}_*")), "a run leaves shared memory behind"
        return said


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
