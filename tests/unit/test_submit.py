"""What `launch/submit.py` hands to sbatch, and how it sees runs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from dsmoelora.errors import ConfigError, UserError
from dsmoelora.signs_of_life.heartbeat import Phase, Sign, clear_signs, write_sign
from launch import submit
from tests.launched import make_workshop

RECIPE = "run: {name: mine}\ntrain: {batch_size: 32, micro_batch_size: 2, max_steps: 100}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = make_workshop(tmp_path) / "recipe.yaml"
    settings = {"name: tiny": "name: mine", "batch_size: 4, micro_batch_size: 1": "batch_size: 32, micro_batch_size: 2"}
    text = path.read_text()
    for old, new in settings.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


def test_a_dry_run_prints_the_command(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", recipe, "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--optim.lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["submit.py", "--dry-run", "--requeue-on-failure", *argv])
    submit.main()
    assert capsys.readouterr().out == (
        "MAX_REQUEUES=20 REQUEUE_ON_FAILURE=1 sbatch --job-name mine --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 "
        f"--signal=B:USR1@300 --partition gpu slurm/train.sbatch --config {recipe} --optim.lr 1e-3\n"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_get_one_task_a_node(recipe: str, launcher: str) -> None:
    options, rest = submit.parse_options(["--launcher", launcher, "--config", recipe])
    command, _ = submit.sbatch_command(options, rest)
    assert command[command.index("--ntasks-per-node") + 1] == "1"
    assert command[-3] == f"slurm/train_{launcher}.sbatch"
    assert (submit.ROOT / command[-3]).exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused_before_it_is_submitted(recipe: str) -> None:
    options, rest = submit.parse_options(["--nodes", "3", "--config", recipe])
    with pytest.raises(ConfigError, match=r"train\.batch_size is 32, but it must be a multiple of .* 2 x 24"):
        submit.sbatch_command(options, rest)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--nodes", "0"], r"--nodes is 0, but it must be 1 or more"),
        (["--gpus-per-node", "0"], r"--gpus-per-node is 0, but it must be 1 or more"),
        (["--gpus-per-node", "2", "--parallel.ep_size", "4"], r"parallel\.ep_size is 4, but it must "),
        (["--model.path", "nowhere"], r"model\.path is 'nowhere', but there is no such folder"),
        (["--adapter.target_modules", "w_proj"], r"adapter\.target_modules is 'w_proj'"),
    ],
)
def test_what_training_would_refuse_is_not_submitted(recipe: str, argv: list[str], why: str) -> None:
    options, rest = submit.parse_options(["--config", recipe, *argv])
    with pytest.raises(UserError, match=why):
        submit.sbatch_command(options, rest)


def test_it_is_submitted_from_the_project_so_that_job_and_check_read_the_same_files(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, rest = submit.parse_options(["--config", recipe])
    with pytest.raises(ConfigError, match=r"Submit there: cd "):
        submit.sbatch_command(options, rest)


@pytest.mark.parametrize("program", ["sbatch", "squeue"])
def test_a_controller_that_is_silent_is_said_to_be(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / program).write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(submit, "_SLURM_TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=f"{program} gives no answer"):
        submit.ask_slurm([program])


def make_run(root: Path, name: str, steps: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = [{"step": step, "loss": 3 - step / 100} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_status_tells_state_step_loss_and_time_left(tmp_path: Path) -> None:
    (make_run(tmp_path, "finished", 100) / "DONE").touch()
    make_run(tmp_path, "preempted", 40)
    make_run(tmp_path, "left", 10)
    running = make_run(tmp_path, "running", 60)
    now = time.time()
    clear_signs(running)
    write_sign(running, Sign(0, 60, Phase.TRAIN, now, now))
    (running / "checkpoint-50").mkdir()
    os.utime(running / "checkpoint-50", (now - 30, now - 30))  # ten steps in 30 s: 40 more take two minutes
    os.utime(running / "metrics.jsonl", (now, now))
    jobs = {"preempted": ("pending", "1:00:00"), "running": ("running", "20:00"), "new": ("pending", "5:00")}
    runs = {run.name: run for run in submit.find_runs(tmp_path, jobs)}
    assert runs["finished"] == submit.Run("finished", "done", "100/100", "2.0000", "-", "-")
    assert runs["preempted"] == submit.Run("preempted", "pending", "40/100", "2.6000", "-", "1:00:00")
    assert runs["left"] == submit.Run("left", "stopped", "10/100", "2.9000", "-", "-")
    assert runs["running"] == submit.Run("running", "running (train)", "60/100", "2.4000", "0:02:00", "20:00")
    assert runs["new"] == submit.Run("new", "pending", "-", "-", "-", "5:00")
