"""What it is worth to make one model of two adapters, each of which has learned one half of the demo's tasks.

    python -m benchmarks.compose             # runs what is missing, then prints the table
    python -m benchmarks.compose --seeds 0   # one seed

One LoRA learns the tasks with numbers, another those with words, a third, as large as the two together, all of them:
the same rows, in as many steps as the two together. What is made of the two learns gates alone, from a few rows of
both, or nothing. Each learning rate of gates is chosen with the first seed, on every other held-out row; the table is
of the other rows. The upper sixth of the layers is adapted, what lies below is computed once, as in `benchmarks.study`.

An arm of a seed is a folder below `.cache/compose/<name>`; Ctrl-C stops, and typed again it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import DTYPE_NAME, setting
from benchmarks.study.bench import Bench
from benchmarks.study.cells import Task
from benchmarks.study.tasks import task_files
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.given import settings_of
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import AdapterConfig, LossesConfig, OptimConfig
from dsmoelora.errors import ConfigError, UserError
from dsmoelora.optim import build_optimizer, build_schedule

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("gcd", "chain_sum", "number_filtering", "letter_counting")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LORA_RATE = 1e-3
_POOL = 0  # the seed that chooses the rows; each seed has them in an order of its own
_WARMUP_SHARE = 12  # one step of so many


@dataclass(frozen=True)
class Arm:
    """A way to come to a model.

    Args:
        name: in tables and folders
        rows: what it learns from: `numbers`, `words`, `all` of both, the `first` few of all, or `none`
        adapter: what it sets in that section of a recipe
        rates: of its gates, from which one is chosen; none where it learns no gates
    """

    name: str
    rows: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()


def _lora(rank: int) -> dict[str, Any]:
    return {"num_experts": 1, "r": rank, "lora_alpha": 4 * rank, "target_modules": TARGETS}


def _constant(start: str) -> dict[str, Any]:
    return {"router": "constant", "router_start": start}


_GATE_RATES, _ROUTER_RATES = (3e-2, 1e-1), (3e-3, 1e-2)
_EACH = (Arm("numbers", "numbers", _lora(8)), Arm("words", "words", _lora(8)))
_MADE = (
    Arm("mean, untrained", "none", _constant("mean")),
    Arm("sum, untrained", "none", _constant("sum")),
    Arm("arrow, top_k 1", "none", {"router": "arrow", "top_k": 1}),
    Arm("CAT, softmax", "first", _constant("softmax"), _GATE_RATES),
    Arm("CAT, mean", "first", _constant("mean"), _GATE_RATES),
    Arm("CAT, sum", "first", _constant("sum"), _GATE_RATES),
    Arm("softmax_topk, top_k 2", "first", {"router": "softmax_topk", "top_k": 2}, _ROUTER_RATES),
)
_ARMS = (Arm("base", "none", _lora(8)), *_EACH, Arm("both, rank 16", "all", _lora(16)), *_MADE)


class Comparison:
    """All arms of one seed.

    Args:
        bench: the rows and the base
        folder: of the arms
        seed: of adapters and the order of rows
        steps: in which the gates learn
    """

    def __init__(self, bench: Bench, folder: Path, seed: int, steps: int) -> None:
        self._bench, self._folder, self._seed = bench, folder, seed
        pool = bench.order(_POOL, bench.task.num_steps)
        order = np.random.default_rng(seed).permutation(pool).tolist()
        is_number = _is_number(bench.task.train)
        self._rows = {
            "numbers": [row for row in order if is_number[row]],
            "words": [row for row in order if not is_number[row]],
            "all": order,
            "first": order[: steps * bench.task.batch_size],
            "none": [],
        }

    def nll(self, arm: Arm, rate: float | None) -> np.ndarray:
        """(N,) of the held-out rows, from the arm's folder, or after it was run."""
        folder = self._folder / f"seed-{self._seed}" / (arm.name if rate is None else f"{arm.name} {rate:g}")
        file = folder / "nll.json"
        if not file.exists():
            found = self._run(arm, rate, folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
            loss = sum(found) / self._bench.tokens_N.sum()
            print(f"seed {self._seed}  {folder.name:28s} held-out loss {loss:.4f}", flush=True)
        return np.array(json.loads(file.read_text()))

    def _run(self, arm: Arm, rate: float | None, folder: Path) -> list[float]:
        settings = dict(arm.adapter)
        if arm in _MADE:
            given = [str(self._folder / f"seed-{self._seed}" / each.name / "adapter") for each in _EACH]
            settings = {"experts_from": given, **settings_of(given, settings), **settings}
            settings["freeze"] = [role for role in ("a", "b") if arm.rows != "none"]
        with self._bench.adapted(AdapterConfig(**settings, seed=self._seed)) as write_folder:
            if arm.rows != "none":
                self._train(self._rows[arm.rows], rate)
            if arm in _EACH:
                write_folder(folder / "adapter")
            return self._bench.held_out_nll()

    def _train(self, rows: Sequence[int], rate: float | None) -> None:
        bench, size = self._bench, self._bench.task.batch_size
        num_steps = len(rows) // size
        warmup = max(1, num_steps // _WARMUP_SHARE)
        config = OptimConfig(lr=_LORA_RATE, lr_router=rate, warmup_steps=warmup)
        optimizer = build_optimizer(bench.model, config)
        schedule = build_schedule(optimizer, config, num_steps)
        log = adapter_context(bench.model).log = RoutingLog(bench.model, LossesConfig(), torch.device("cpu"))
        bench.model.train()
        for step in range(num_steps):
            if not bench.step(rows[step * size : (step + 1) * size], 0, optimizer, log, config.max_grad_norm):
                raise ConfigError(f"The loss is not finite with a rate of {rate or _LORA_RATE:g}.")
            schedule.step()


def _is_number(file: Path) -> list[bool]:
    """Whether each row is of one of the tasks with numbers."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["task"] in NUMBERS for line in lines]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    options = parse(argv)
    try:
        compare(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.compose", description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="compose", help="folder of the arms, below .cache/compose")
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m")
    parser.add_argument("--demo", type=Path, default=ROOT / "data/demo", help="folder of the demo's data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the rates")
    parser.add_argument("--steps", type=int, default=32, help="in which each of the two learns, on average")
    parser.add_argument("--gate-steps", type=int, default=12, help="in which gates learn")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-rows", type=int, default=96)
    return parser.parse_args(argv)


def compare(options: argparse.Namespace) -> None:
    """All arms of all seeds."""
    folder = ROOT / ".cache" / "compose" / options.name
    files = task_files("demo", folder, options.demo, options.demo)
    # both halves' rows are those of `--steps` each
    sizes = (2 * options.steps, options.batch_size, options.eval_rows, 256)
    paths = (folder, options.model, None, files.train, files.held_out)
    task = Task(*paths, *sizes, "sixth", DTYPE_NAME, seeds=(_POOL,), rate_seeds=())
    kept = folder / "settings.json"
    settings = json.dumps(task.settings() | {"gate_steps": options.gate_steps})
    folder.mkdir(parents=True, exist_ok=True)
    if kept.exists() and kept.read_text() != settings:
        raise ConfigError(f"{folder} was made with other settings. Take another --name, or this folder away.")
    kept.write_text(settings)
    bench = Bench(task)
    is_number_N = np.array(_is_number(files.held_out))[bench.eval_rows]
    chooses_N = np.arange(len(bench.eval_rows)) % 2 == 0
    rates: dict[str, float | None] = {}
    found: dict[str, list[np.ndarray]] = {arm.name: [] for arm in _ARMS}
    for seed in options.seeds:
        comparison = Comparison(bench, folder, seed, options.gate_steps)
        for arm in _ARMS:
            if arm.name not in rates:
                tried = {rate: comparison.nll(arm, rate)[chooses_N].sum() for rate in arm.rates}
                rates[arm.name] = min(tried, key=lambda rate: tried[rate]) if tried else None
            found[arm.name].append(comparison.nll(arm, rates[arm.name]))
    halves = {"numbers": is_number_N, "words": ~is_number_N, "all": np.ones_like(is_number_N)}
    print(f"\n{setting()}; held-out loss, mean (smallest to largest) over seeds {options.seeds}\n")
    print("| | " + " | ".join(halves) + " | rate of the gates |\n|---|---|---|---|---|")
    for name, nll_SN in found.items():
        losses = [_loss(nll_SN, bench.tokens_N, ~chooses_N & of) for of in halves.values()]
        rate = "" if rates[name] is None else f"{rates[name]:g}"
        print(f"| {name} | " + " | ".join(losses) + f" | {rate} |")


def _loss(nll_SN: Sequence[np.ndarray], tokens_N: np.ndarray, rows_N: np.ndarray) -> str:
    losses = [float(nll_N[rows_N].sum() / tokens_N[rows_N].sum()) for nll_N in nll_SN]
    return f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


if __name__ == "__main__":
    main()
