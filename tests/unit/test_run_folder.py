"""Whether a run folder may be used, and what is written there first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsmoelora.cli import parse_command
from dsmoelora.config import OptimConfig, Recipe, RunConfig
from dsmoelora.errors import CheckpointError, ConfigError
from dsmoelora.run.folder import check_run_folder, find_checkpoint, write_description


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(run=RunConfig(name="mine", dir=str(tmp_path / "runs")))


def make_checkpoints(recipe: Recipe, *steps: int) -> Path:
    folder = Path(recipe.run.dir) / recipe.run.name
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_new_folder_may_be_used(recipe: Recipe, resume: str) -> None:
    check_run_folder(recipe, resume)
    assert find_checkpoint(recipe, resume) is None
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize("result", ["metrics.jsonl", "adapter", "checkpoint-5"])
def test_the_results_of_a_run_are_not_overwritten(recipe: Recipe, result: str) -> None:
    (make_checkpoints(recipe) / result).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"mine holds a run already \({result}\).*--resume auto.*run.name"):
        check_run_folder(recipe, "none")
    check_run_folder(recipe, "auto")


def test_a_run_that_never_began_may_begin_again(recipe: Recipe) -> None:
    write_description(make_checkpoints(recipe, 5).parent / "other", recipe, {})
    recipe.run.name = "other"
    check_run_folder(recipe, "none")


def test_a_named_checkpoint_must_be_there(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_run_folder(recipe, str(tmp_path / "checkpoint-5"))


def test_the_newest_checkpoint_of_the_run_may_be_named(recipe: Recipe) -> None:
    newest = make_checkpoints(recipe, 5, 10) / "checkpoint-10"
    check_run_folder(recipe, str(newest))
    assert find_checkpoint(recipe, str(newest)) == newest


def test_an_older_checkpoint_may_only_start_another_run(recipe: Recipe) -> None:
    older = make_checkpoints(recipe, 5, 10, 100) / "checkpoint-5"
    with pytest.raises(CheckpointError, match="checkpoint-100, checkpoint-10 of the same run"):
        check_run_folder(recipe, str(older))
    recipe.run.name = "branch"
    check_run_folder(recipe, str(older))


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(recipe: Recipe) -> None:
    foreign = make_checkpoints(Recipe(run=RunConfig(name="other", dir=recipe.run.dir)), 5) / "checkpoint-5"
    make_checkpoints(recipe, 5)
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run_folder(recipe, str(foreign))


def test_a_run_that_began_from_another_ones_checkpoint_may_name_it_again(recipe: Recipe) -> None:
    foreign = make_checkpoints(Recipe(run=RunConfig(name="other", dir=recipe.run.dir)), 5) / "checkpoint-5"
    folder = make_checkpoints(recipe)
    write_description(folder, recipe, {}, foreign)
    (folder / "metrics.jsonl").touch()
    for resume in (str(foreign), "auto"):
        check_run_folder(recipe, resume)
        assert find_checkpoint(recipe, resume) == foreign
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run_folder(recipe, str(foreign.with_name("checkpoint-4")))
    foreign.rmdir()
    with pytest.raises(CheckpointError, match=r"began from .*checkpoint-5 and has no checkpoint of its own, but there"):
        find_checkpoint(recipe, "auto")
    make_checkpoints(recipe, 7)
    check_run_folder(recipe, str(foreign))
    write_description(folder, recipe, {})
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run_folder(recipe, str(foreign))


def test_the_description_reproduces_the_run(recipe: Recipe, tmp_path: Path) -> None:
    recipe.optim = OptimConfig(lr=3e-4)
    write_description(tmp_path / "run", recipe, {"zero_optimization": {"stage": 3}})
    assert parse_command(["--config", str(tmp_path / "run" / "recipe.yaml")]).recipe == recipe
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text()) == {"zero_optimization": {"stage": 3}}


def test_an_earlier_recipe_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    for lr in (1e-3, 1e-3, 2e-3, 3e-3):
        recipe.optim.lr = lr
        write_description(tmp_path, recipe, {})
    rates = {path.name: parse_command(["--config", str(path)]).recipe.optim.lr for path in tmp_path.glob("*.yaml")}
    assert rates == {"recipe.1.yaml": 1e-3, "recipe.2.yaml": 2e-3, "recipe.yaml": 3e-3}
