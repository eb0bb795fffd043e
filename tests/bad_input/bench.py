"""The small run that works, which every case spoils in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import tiny_llama

RECIPE = """
run: {{name: tiny, dir: {folder}/runs}}
model: {{path: {folder}/model, dtype: fp32}}
adapter: {{num_experts: 4, top_k: 2, r: 2, target_modules: [q_proj, v_proj]}}
data: {{train: [{{path: {folder}/train.jsonl}}], eval: [{{path: {folder}/eval.jsonl}}], max_length: 64}}
train: {{max_steps: 2, batch_size: 4, micro_batch_size: 1, save_every: 1, eval_every: 0, report_to: none}}
"""
ROW = {"instruction": "Say it.", "input": "", "output": "It."}


@dataclass(frozen=True)
class Bench:
    """A folder with model, data and recipe.yaml, and where it was asked for a finished run in runs/tiny."""

    folder: Path

    def train(self, *more: object, recipe: str = "") -> list[str]:
        """A command line of launch/train.py; `recipe` is added to the file."""
        path = self.folder / "recipe.yaml"
        path.write_text(path.read_text() + recipe)
        return ["train.py", "--config", str(path), *map(str, more)]

    def deepspeed(self, content: dict[str, Any] | str, *more: object) -> list[str]:
        """The same, with a DeepSpeed file of this content."""
        path = self.folder / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return self.train("--deepspeed", path, *more)

    def rows(self, *rows: object, name: str = "train.jsonl") -> list[str]:
        """The same, with other training rows; text stands as it is."""
        path = self.folder / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return self.train("--data.train", f"[{{path: {path}}}]")

    def spoiled_json(self, file: str, **changes: Any) -> None:
        """Change keys of a JSON file; None takes one out."""
        path = self.folder / file
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def plan(self, *more: object) -> list[str]:
        """A command line of launch/plan.py."""
        return ["plan.py", *self.train(*more)[1:]]

    def generate(self, *more: object) -> list[str]:
        """A command line of launch/generate.py."""
        return ["generate.py", "--adapter", str(self.adapter), "--prompt", "x", *map(str, more)]

    def export(self, *more: object) -> list[str]:
        """A command line of launch/export.py."""
        out = self.folder / "exported"
        return ["export.py", "--adapter", str(self.adapter), "--out", str(out), "--format", *map(str, more)]

    def merge(self, *more: object) -> list[str]:
        """A command line of launch/merge.py."""
        return ["merge.py", "--adapters", str(self.adapter), *map(str, more)]

    def evaluate(self, *more: object) -> list[str]:
        """A command line of launch/evaluate.py."""
        return ["evaluate.py", "--adapter", str(self.adapter), *map(str, more)]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint-2"


def make_bench(folder: Path) -> Bench:
    """A bench on which everything works."""
    tiny_llama(folder / "model", hidden_size=32, intermediate_size=64)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text(8 * (json.dumps(ROW) + "\n"))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return Bench(folder)


Case = Callable[[Bench], list[str]]


def override(*words: object) -> Case:
    """The recipe with these words behind it."""
    return lambda bench: bench.train(*words)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
