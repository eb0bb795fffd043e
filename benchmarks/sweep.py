"""Which optimizer learns best? Every rule at every learning rate on the demo's data or on files of your own.

    python benchmarks/sweep.py             # runs what is missing; Ctrl-C stops it, typed again it goes on
    python benchmarks/sweep.py --table     # only prints the table of what is there
    python benchmarks/sweep.py --name qa --train qa/train.jsonl --eval qa/dev.jsonl

One process and one thread a run, several runs at a time. A run is a folder below `.cache/sweep/<name>`; finished ones
are not run again. The table gives each rule's best learning rate on held-out data, at equal betas and equal clipping;
the best cell of each rule is repeated with three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from worker import ROOT

ADAMW_LRS = (1e-3, 3e-3, 1e-2)
SGD_LRS = tuple(round(base * 10**power, 6) for power in (-2, -1, 0) for base in (1, 3)) + (10.0,)
BETAS = ((0.9, 0.999), (0.7, 0.8))
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Rule:
    """What is compared: everything but the learning rate and the seed."""

    optimizer: str
    betas: tuple[float, float] | None
    preconditioner: str
    gate_power: float

    @property
    def label(self) -> str:
        """A folder-safe name."""
        betas = "" if self.betas is None else f"-b{self.betas[0]}-{self.betas[1]}"
        return f"{self.optimizer}{betas}-{self.preconditioner}-g{self.gate_power}"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The rates that are tried."""
        return SGD_LRS if self.optimizer == "sgd" else ADAMW_LRS


@dataclass(frozen=True)
class Cell:
    """One run."""

    rule: Rule
    lr: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.rule.label}-lr{self.lr:g}-s{self.seed}"


def rules() -> Iterator[Rule]:
    """Every optimizer with every preconditioner; the gate's power where factors see a rescaled gradient."""
    for optimizer, betas in (("sgd", None), *(("adamw", pair) for pair in BETAS)):
        for preconditioner in ("none", "scaled", "tangent"):
            for gate_power in (1.0,) if preconditioner == "none" else (1.0, 0.5):
                yield Rule(optimizer, betas, preconditioner, gate_power)


def held_out(folder: Path, cell: Cell) -> float | None:
    """The last held-out loss of a finished run; infinity where it diverged; None where it has not finished."""
    run = folder / cell.name
    if (run / "diverged").exists():
        return float("inf")
    if not (run / "adapter").exists():
        return None
    losses = [json.loads(line).get("eval/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [loss for loss in losses if loss is not None][-1]


def run_cell(cell: Cell, folder: Path, args: argparse.Namespace) -> None:
    """Train one cell to its end, from its last checkpoint if it was stopped."""
    rule = cell.rule
    flags = {
        "run.dir": folder,
        "run.name": cell.name,
        "run.seed": cell.seed,
        "adapter.gate_power": rule.gate_power,
        "optim.name": rule.optimizer,
        "optim.lr": cell.lr,
        "optim.lr_router": "null",
        "optim.preconditioner": rule.preconditioner,
        "train.max_steps": args.steps,
        "train.eval_every": args.steps,
        "train.save_every": 20,
        "train.num_samples": 0,
        "data.train": json.dumps([{"path": str(args.train)}]),
        "data.eval": json.dumps([{"path": str(args.eval)}]),
    }
    if rule.betas is not None:
        flags["optim.betas"] = json.dumps(rule.betas)
    command = [sys.executable, "launch/train.py", "--config", "launch/recipes/demo.yaml", "--resume", "auto"]
    command += [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    (folder / cell.name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{cell.name}.log").open("a") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=False
        )
    if done.returncode != 0 and "not finite" in (folder / f"{cell.name}.log").read_text():
        (folder / cell.name / "diverged").touch()
    print(f"{cell.name:44s} held-out loss {held_out(folder, cell)}", flush=True)


def run_missing(cells: list[Cell], folder: Path, args: argparse.Namespace) -> None:
    """Run the cells that have no result yet, `--jobs` at a time."""
    missing = [cell for cell in cells if held_out(folder, cell) is None]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: run_cell(cell, folder, args), missing))


def best_cell(rule: Rule, folder: Path) -> tuple[float, Cell] | None:
    """The best learning rate of a rule so far, and what it reached."""
    found = [(loss, Cell(rule, lr)) for lr in rule.learning_rates if (loss := held_out(folder, Cell(rule, lr)))]
    return min(found, key=lambda one: one[0]) if found else None


def print_table(folder: Path) -> None:
    """Markdown: a line a rule."""
    print("\n| optimizer | betas | preconditioner | gate_power | best lr | held-out loss | over seeds |")
    print("|---|---|---|---|---|---|---|")
    for rule in rules():
        best = best_cell(rule, folder)
        if best is None:
            continue
        loss, cell = best
        losses = [one for seed in SEEDS if (one := held_out(folder, Cell(rule, cell.lr, seed))) is not None]
        spread = f"{statistics.mean(losses):.4f} ± {statistics.pstdev(losses):.4f} ({len(losses)})"
        betas = "" if rule.betas is None else f"{rule.betas[0]}, {rule.betas[1]}"
        print(
            f"| {rule.optimizer} | {betas} | {rule.preconditioner} | {rule.gate_power:g} | {cell.lr:g} "
            f"| {loss:.4f} | {spread} |"
        )


def main() -> None:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="demo", help="folder below .cache/sweep")
    parser.add_argument("--train", type=Path, default=ROOT / "data/demo/train.jsonl")
    parser.add_argument("--eval", type=Path, default=ROOT / "data/demo/eval.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there and end")
    args = parser.parse_args()
    folder = ROOT / ".cache" / "sweep" / args.name
    if not args.table:
        run_missing([Cell(rule, lr) for rule in rules() for lr in rule.learning_rates], folder, args)
        best = [found[1] for rule in rules() if (found := best_cell(rule, folder))]
        run_missing([Cell(cell.rule, cell.lr, seed) for cell in best for seed in SEEDS], folder, args)
    print_table(folder)


if __name__ == "__main__":
    main()
