"""Every recipe and every DeepSpeed file that ships passes a dry run, against a tiny model of its architecture."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from dsmoelora.cli import parse_command
from dsmoelora.parallel.dtype import settle_dtype
from dsmoelora.plan import make_plan, print_plan
from tests.architectures import save_model
from tests.forked import Program

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
STARTING_POINTS = [path for path in RECIPES if path.parent.name == "recipes"]
DEEPSPEED_FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@dataclass(frozen=True)
class StandIn:
    """What is put in the place of the model and the rows that a recipe expects.

    Args:
        architecture: of the model, see tests/architectures.py
        row: of the data, in the recipe's format and columns; of several sets, the columns of all
        layers: what the plan says is adapted
        overrides: of what a tiny model has no room for
    """

    architecture: str
    row: dict[str, Any]
    layers: str
    overrides: tuple[str, ...] = ()


ALPACA = {"instruction": "Say yes.", "input": "", "output": "yes"}
MESSAGES = {"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]}
MATHS = {"query": "1+1?", "response": "2", "question": "2+2?", "answer": "4"}
COMMONSENSE_QA = {
    "question": "Where is milk kept?",
    "choices": {"label": ["A", "B"], "text": ["fridge", "shoe"]},
    "answerKey": "A",
}
ATTENTION = "2 x q_proj, 2 x k_proj, 2 x v_proj, 2 x o_proj"
ALL = f"{ATTENTION}, 2 x gate_proj, 2 x up_proj, 2 x down_proj"
NO_OUTPUT_NO_GATE = "2 x q_proj, 2 x k_proj, 2 x v_proj, 2 x up_proj, 2 x down_proj"
STAND_INS = {
    "adamole.yaml": StandIn("llama", COMMONSENSE_QA, ATTENTION),
    "comoe.yaml": StandIn("llama", ALPACA, ATTENTION),
    "demo.yaml": StandIn("llama", ALPACA, ATTENTION),
    "dora.yaml": StandIn("llama", ALPACA, NO_OUTPUT_NO_GATE),
    "goat.yaml": StandIn("llama", MATHS, ALL),
    "gpt2_tiny_text.yaml": StandIn(
        "gpt2", {"text": "Once upon a time."}, "2 x c_attn, 4 x c_proj, 2 x c_fc", ("--data.max_length", "64")
    ),
    "llama2_7b_alpaca.yaml": StandIn("llama", ALPACA, ATTENTION),
    "llama3_8b_chat.yaml": StandIn("llama", MESSAGES, ALL),
    "lora_plus.yaml": StandIn("llama", ALPACA, ALL),
    "mistral_7b_sharegpt.yaml": StandIn("mistral", SHAREGPT, ATTENTION),
    "mixlora.yaml": StandIn("llama", ALPACA, ALL),
    "moelora_contrastive.yaml": StandIn("llama", ALPACA, "2 x q_proj, 2 x v_proj"),
    "moslora_llama3.yaml": StandIn("llama", ALPACA, NO_OUTPUT_NO_GATE),
    "pissa.yaml": StandIn("llama", MATHS, ALL, ("--adapter.r", "8")),
    "qwen2.5_7b_math.yaml": StandIn("qwen2", MATHS, ALL),
    "smora.yaml": StandIn("llama", ALPACA, ALL),
    "sun2025_riemannian.yaml": StandIn("llama", ALPACA, ATTENTION),
}


def stand_in(recipe: Path, folder: Path) -> list[str]:
    """Overrides that put a tiny model and two rows in the place of what the recipe expects."""
    chosen = STAND_INS[recipe.name]
    rows = folder / "rows.jsonl"
    rows.write_text(2 * (json.dumps(chosen.row) + "\n"))
    overrides = ["--model.path", str(save_model(chosen.architecture, folder / "model")), *chosen.overrides]
    data = yaml.safe_load(recipe.read_text())["data"]
    for key in ("train", "eval"):
        sources = [{**source, "path": str(rows)} for source in data[key]]
        for source in sources:  # a file has no parts
            source.pop("split", None), source.pop("subset", None)
        overrides += [f"--data.{key}", json.dumps(sources)]
    return overrides


def arguments(recipe: Path, deepspeed: Path, folder: Path) -> list[str]:
    """A command line for `launch/train.py`, from its own folder."""
    files = ["--config", str(recipe), "--deepspeed", str(deepspeed)]
    if deepspeed.name == "zero0.json":  # takes fp32 alone
        files += ["--model.dtype", "fp32"]
    return [*files, *stand_in(recipe, folder), "--run.dir", str(folder / "runs"), "--dry-run", "--world-size", "2"]


def test_there_are_recipes_and_deepspeed_files() -> None:
    assert {path.name for path in RECIPES} == set(STAND_INS)
    assert {"zero3.json", "zero3_offload.json"} <= {path.name for path in DEEPSPEED_FILES}


@pytest.mark.parametrize(
    ("recipe", "deepspeed"),
    [(recipe, DEEPSPEED_FILES[i % len(DEEPSPEED_FILES)]) for i, recipe in enumerate(RECIPES)]
    + [(RECIPES[0], deepspeed) for deepspeed in DEEPSPEED_FILES[1:]],
    ids=lambda path: path.name,
)
def test_every_recipe_can_be_planned(recipe: Path, deepspeed: Path, tmp_path: Path) -> None:
    command, text = parse_command(arguments(recipe, deepspeed, tmp_path)), io.StringIO()
    recipe_in_force = settle_dtype(command.recipe).recipe
    plan = make_plan(recipe_in_force, command.deepspeed, world_size=2, resume="none")
    print_plan(plan, Console(file=text, width=200))
    assert STAND_INS[recipe.name].layers in text.getvalue()
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_dry_run(tmp_path: Path) -> None:
    recipe = ROOT / "launch" / "recipes" / "demo.yaml"
    argv = [str(ROOT / "launch" / "train.py"), *arguments(recipe, ROOT / "ds_configs" / "zero3.json", tmp_path)]
    program = Program(argv, env=os.environ)
    said, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    assert STAND_INS[recipe.name].layers in said, said
    assert "memory of a rank" in said
    assert "sent in a step" in said
    assert max(map(len, said.split("note: ")[0].splitlines())) <= 100
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_opens_with_its_launch_command(recipe: Path) -> None:
    head = recipe.read_text().partition("\nrun:")[0]
    assert head.startswith("# ")
    assert f"--config {recipe.relative_to(ROOT)}" in head
    named = re.findall(r"--deepspeed (\S+)", head)
    assert named and all((ROOT / path).is_file() for path in named)


@pytest.mark.parametrize("recipe", STARTING_POINTS, ids=lambda path: path.name)
def test_a_starting_point_names_the_plain_lora_of_its_size(recipe: Path) -> None:
    """With as many numbers in its factors, at the same scale."""
    head = recipe.read_text().partition("\nrun:")[0]
    (flags,) = re.findall(r"^# Or plain LoRA: +(.*)$", head, re.MULTILINE)
    experts, plain = (parse_command(["--config", str(recipe), *more]).recipe.adapter for more in ([], flags.split()))
    assert plain.num_experts == 1 and plain.r == experts.num_experts * experts.r
    assert plain.lora_alpha / plain.r == experts.lora_alpha / experts.r
