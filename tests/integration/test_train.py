"""launch/train.py and launch/generate.py on a tiny model, as a user runs them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsmoelora.cli import parse_command
from dsmoelora.run.files import read_metrics
from launch import generate, train
from tests.conftest import PoolFactory
from tests.forked import Program
from tests.launched import ROOT, Ranks, make_workshop

PACKED = ("--data.packing", "true", "--train.batch_size", "2")
STREAMED = ("--data.streaming", "true", "--data.shuffle_buffer", "8", "--data.on_bad_row", "skip")
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
    expected = {"recipe.yaml", "deepspeed.json", "metrics.jsonl", "tensorboard", "adapter", "heartbeat", "DONE"}
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


@pytest.mark.parametrize(
    "mode",
    [
        PACKED,
        (*PACKED, "--adapter.init", "gradient", "--adapter.init_samples", "3"),
        STREAMED,
        (*STREAMED, "--adapter.init", "gradient"),
    ],
    ids=["packed", "packed-gradient", "streamed", "streamed-gradient"],
)
def test_an_interrupted_run_goes_on_with_the_same_samples(
    mode: tuple[str, ...], workshop: Path, worker_pool: PoolFactory, tmp_path: Path
) -> None:
    """Epochs end in the middle of batches; the run stops between two steps and between two checkpoints."""
    rows = (workshop / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(["{broken" * ("skip" in mode), *rows[:9]]))
    argv = ("--config", str(workshop / "recipe.yaml"), "--data.train", f"[{{path: {tmp_path}/train.jsonl}}]", *mode)
    argv += ("--train.max_steps", "4", "--train.save_every", "2", "--train.num_samples", "0", "--data.eval", "[]")
    straight, broken = tmp_path / "straight" / "tiny", tmp_path / "broken" / "tiny"
    worker_pool(2).run(run_command, *argv, "--run.dir", str(straight.parent))
    shutil.copytree(straight, broken)
    for folder in ("checkpoint-4", "adapter"):
        shutil.rmtree(broken / folder)
    worker_pool(2).run(run_command, *argv, "--run.dir", str(broken.parent), "--resume", "auto")
    found, again = (read_metrics(folder / "metrics.jsonl") for folder in (straight, broken))
    names = (*COMPARED, *(("data/epoch", "data/skipped_rows") if "--data.streaming" in mode else ()))
    assert len({row["loss"] for row in found}) == 4
    assert [[row.get(name) for name in names] for row in found] == [[row.get(name) for name in names] for row in again]
    wanted, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, broken))
    assert all(bool((wanted[name] == resumed[name]).all()) for name in wanted)


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


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_who_asks_for_help_meets_nobody(flag: str) -> None:
    """As in a shell inside of a Slurm step of four tasks."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n1"}
    program = Program([str(ROOT / "launch" / "train.py"), flag], env=os.environ | slurm)
    said, errors = program.communicate(timeout=60)
    assert program.returncode == 0 and ("usage" if flag == "--help" else "dsmoelora 0.") in said, errors


@pytest.mark.parametrize("rank", [0, 1])
def test_who_asks_for_the_folder_of_a_run_needs_no_whole_launcher(workshop: Path, rank: int) -> None:
    """Nothing but a rank and a number of ranks is in the environment; rank 0 answers."""
    argv = [str(ROOT / "launch" / "train.py"), "--config", str(workshop / "recipe.yaml"), "--print_folder"]
    program = Program(argv, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "4"})
    said, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    assert said == ("" if rank else f"{workshop}/runs/tiny\n")


def test_an_error_on_one_rank_ends_all(workshop: Path) -> None:
    """The recipe is missing on rank 1, as on a node whose disk is not shared."""
    first, second = start_ranks(["--config", str(workshop / "recipe.yaml")], ["--config", "nowhere.yaml"])
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.startswith("error: rank 1: --config nowhere.yaml: there is no such file")
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_to_the_same_end(
    workshop: Path, worker_pool: PoolFactory
) -> None:
    argv = ["--config", str(workshop / "recipe.yaml"), "--resume", "auto", "--train.max_steps", "20"]
    argv += ["--train.eval_every", "12", "--train.save_every", "0", "--train.num_samples", "0"]
    straight, broken = workshop / "straight" / "tiny", workshop / "stopped" / "tiny"
    worker_pool(2).run(run_command, *argv, "--run.dir", str(straight.parent))
    argv += ["--run.dir", str(broken.parent)]
    with Ranks(argv, argv) as ranks:
        ranks.wait_for_step(broken, 3)
        ranks.processes[1].send_signal(signal.SIGUSR1)
        time.sleep(0.05)  # soon after it, probably into the save
        ranks.processes[1].send_signal(signal.SIGTERM)
        ended = ranks.finish()
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr
    (checkpoint,) = broken.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 3 <= step < 20
    assert f" s after the request: step {step} of 20 lies in {checkpoint}. Go on" in ended[0].stderr
    assert not (broken / "DONE").exists() and not (broken / "STOP").exists()
    worker_pool(2).run(run_command, *argv)
    assert (broken / "DONE").exists()
    rows, again = (read_metrics(folder / "metrics.jsonl") for folder in (straight, broken))
    assert [[row.get(name) for name in COMPARED] for row in rows] == [
        [row.get(name) for name in COMPARED] for row in again
    ]
    wanted, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, broken))
    assert all(bool((wanted[name] == found[name]).all()) for name in wanted)
