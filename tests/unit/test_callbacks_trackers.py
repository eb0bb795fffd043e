"""W&B and trackio get the numbers of `metrics.jsonl`, on rank 0 and when asked for."""

from __future__ import annotations

import importlib.machinery
import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from rich.console import Console

from dsmoelora.callbacks import Callback, TrainingRun, open_trackers
from dsmoelora.callbacks.tensorboard import TensorBoard
from dsmoelora.config import Recipe, RunConfig, TrainConfig
from dsmoelora.errors import ConfigError
from dsmoelora.parallel import comm
from dsmoelora.plan import make_plan
from dsmoelora.trainer import default_callbacks
from tests.fake_engine import FakeEngine

ROWS: list[dict[str, float | None]] = [
    {"step": 0, "eval/loss": 2.5},
    {"step": 1, "loss": 3.0, "lr": 1e-3, "grad_norm": None, "throughput(tokens/s)": float("inf")},
]
LOGGED = [({"eval/loss": 2.5}, 0), ({"train/loss": 3.0, "train/lr": 1e-3}, 1)]


class FakeTracker(ModuleType):
    """A package with the interface that W&B and trackio share; writes down what it is called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> FakeTracker:
        self.opened.append(arguments)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    fake = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def recipe_for(report_to: list[str] | str, **train: Any) -> Recipe:
    return Recipe(run=RunConfig(name="mine", seed=7), train=TrainConfig(max_steps=1, report_to=report_to, **train))


def write(callback: Callback, recipe: Recipe, folder: Path) -> None:
    """What the trainer would call."""
    engine = FakeEngine(recipe)
    run = TrainingRun(recipe, cast(Any, engine), folder, None)
    callback.on_train_begin(run)
    for row in ROWS:
        engine.step, run.metrics = int(row["step"] or 0), row
        callback.on_metrics(run)
    callback.on_train_end(run)


def test_a_tracker_gets_the_recipe_and_every_finite_number(package: FakeTracker, tmp_path: Path) -> None:
    recipe = recipe_for([package.__name__], project="ours")
    (callback,) = open_trackers(recipe, tmp_path, resumed=False)
    (opened,) = package.opened
    assert (opened["project"], opened["name"], opened["config"]["run"]["seed"]) == ("ours", "mine", 7)
    write(callback, recipe, tmp_path)
    assert package.logged == LOGGED and package.finished == 1


def test_a_resumed_run_goes_on_and_a_new_one_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb, trackio = FakeTracker("wandb"), FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for resumed in (False, True, False):
        open_trackers(recipe_for(["wandb", "trackio"]), tmp_path, resumed)
    first, second, third = (opened["id"] for opened in wandb.opened)
    assert first == second != third
    assert [opened["resume"] for opened in trackio.opened] == ["never", "allow", "never"]


def test_only_rank_0_tracks(package: FakeTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = open_trackers(recipe_for(package.__name__), tmp_path, resumed=False)
    console = Console(quiet=True)
    assert set(trackers) <= set(default_callbacks(console, trackers))
    monkeypatch.setattr(comm, "rank", lambda: 1)
    assert not set(trackers) & set(default_callbacks(console, trackers))


def test_tensorboard_is_the_default_and_none_is_none(tmp_path: Path) -> None:
    (callback,) = open_trackers(Recipe(), tmp_path, resumed=False)
    assert isinstance(callback, TensorBoard)
    assert open_trackers(recipe_for("none"), tmp_path, resumed=False) == []
    assert open_trackers(recipe_for([]), tmp_path, resumed=False) == []


def test_an_unknown_tracker_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"train\.report_to is 'mlflow'.*tensorboard, wandb, trackio, or none"):
        TrainConfig(report_to=["tensorboard", "mlflow"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_not_installed_is_named_in_the_plan(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else object())
    recipe = recipe_for(name)
    recipe.run.dir = str(tmp_path / "runs")
    with pytest.raises(ConfigError, match=rf"train\.report_to has '{name}'.*not installed.*pip install {name}"):
        make_plan(recipe, {}, world_size=1, resume="none")


def test_a_package_that_cannot_open_a_run_is_a_users_error(
    package: FakeTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login()")

    monkeypatch.setattr(package, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot open a run: api_key not configured.*take it out of train\.report_to"
    ):
        open_trackers(recipe_for(package.__name__), tmp_path, resumed=False)


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = recipe_for("wandb")
    (callback,) = open_trackers(recipe, tmp_path, resumed=False)
    write(callback, recipe, tmp_path)
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    (record,) = tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    content = record.read_bytes()
    for name in (b"eval/loss", b"train/loss", b"train/lr"):
        assert name in content


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    recipe = recipe_for("trackio")
    (callback,) = open_trackers(recipe, tmp_path, resumed=False)
    write(callback, recipe, tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "dsmoelora.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'mine' ORDER BY step").fetchall()
    assert [(json.loads(metrics), step) for step, metrics in rows] == LOGGED
