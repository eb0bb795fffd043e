"""Every recipe and every DeepSpeed file that ships passes a dry run, as a user would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DEEPSPEED_FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put a small model and two rows in the place of what a recipe expects."""
    folder = tmp_path_factory.mktemp("own")
    tiny_llama(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text('{"instruction": "Say yes.", "input": "", "output": "yes"}\n' * 2)
    source = json.dumps([{"path": str(rows)}])
    return ["--model.path", str(folder / "model"), "--data.train", source, "--data.eval", source]


def dry_run(recipe: Path, deepspeed: Path, world_size: int, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/train.py", "--config", str(recipe), "--deepspeed", str(deepspeed)]
    command += ["--dry-run", "--world-size", str(world_size), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_there_are_recipes_and_deepspeed_files() -> None:
    assert {"demo.yaml", "llama2_7b_alpaca.yaml"} <= {path.name for path in RECIPES}
    assert {"zero3.json", "zero3_offload.json"} <= {path.name for path in DEEPSPEED_FILES}


@pytest.mark.parametrize(
    ("recipe", "deepspeed"),
    [(recipe, DEEPSPEED_FILES[i % len(DEEPSPEED_FILES)]) for i, recipe in enumerate(RECIPES)]
    + [(RECIPES[0], deepspeed) for deepspeed in DEEPSPEED_FILES[1:]],
    ids=lambda path: path.name,
)
def test_dry_run(recipe: Path, deepspeed: Path, own_files: list[str], tmp_path: Path) -> None:
    done = dry_run(recipe, deepspeed, 2, [*own_files, "--run.dir", str(tmp_path / "runs")])
    assert done.returncode == 0, done.stderr
    assert "2 x q_proj, 2 x k_proj, 2 x v_proj, 2 x o_proj" in done.stdout, done.stdout
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_opens_with_its_launch_command(recipe: Path) -> None:
    head = recipe.read_text().partition("\nrun:")[0]
    assert head.startswith("# ")
    assert f"--config launch/recipes/{recipe.name}" in head
    assert "--deepspeed ds_configs/zero3.json" in head
