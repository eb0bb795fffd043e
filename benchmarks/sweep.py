"""Which optimizer learns best? Every rule at its best learning rate, on the demo's data or on files of your own.

    python benchmarks/sweep.py             # runs what is missing; Ctrl-C stops it, typed again it goes on
    python benchmarks/sweep.py --table     # only prints the tables of what is there
    python benchmarks/sweep.py --name qa --train qa/train.jsonl --eval qa/dev.jsonl --gate-powers 1

Each run is one process and one thread on plain tensors (no DeepSpeed: the optimizer is the same there), with fp32
masters of adapters, equal batches, clipping and schedule. Rates are a grid, AdamW {1e-3, 3e-3, 1e-2}, SGD 0.01 to
10 by factors of about 3; each rule climbs from the middle of its grid until both neighbours of its best rate are worse.
The best cell of each rule is then repeated with three seeds. A finished run is a file in
`.cache/sweep/<name>` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from machine import DTYPE, setting
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora.adapters import inject
from dsmoelora.config import AdapterConfig, DataSource, ModelConfig, OptimConfig
from dsmoelora.data import InstructionDataset, MicroBatch, eval_micro_batches, load_instructions, train_steps
from dsmoelora.model import load_tokenizer
from dsmoelora.optim import ShardOptimizer, build_schedule, trainables
from dsmoelora.optim.rows import ShardGroup, whole

ROOT = Path(__file__).resolve().parents[1]
ADAMW_LRS = (1e-3, 3e-3, 1e-2)
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BETAS = ((0.9, 0.999), (0.7, 0.8))
SEEDS = (0, 1, 2)
DAMPING_ABS = OptimConfig().damping_abs
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Task:
    """What all cells of a sweep share; `folder` holds their results."""

    folder: Path
    model: Path
    train: Path
    held_out: Path
    steps: int
    batch_size: int
    eval_rows: int
    max_length: int


@dataclass(frozen=True)
class Rule:
    """What is compared: everything but the learning rate and the seed."""

    optimizer: str
    betas: tuple[float, float] | None
    preconditioner: str
    gate_power: float
    damping_abs: float

    @property
    def grid(self) -> tuple[float, ...]:
        """The rates that may be tried."""
        return SGD_LRS if self.optimizer == "sgd" else ADAMW_LRS


@dataclass(frozen=True)
class Cell:
    """One run."""

    rule: Rule
    lr: float
    seed: int = 0

    def file(self, folder: Path) -> Path:
        """Where its result lies."""
        rule = self.rule
        betas = "" if rule.betas is None else f"-b{rule.betas[0]}-{rule.betas[1]}"
        damping = "" if rule.damping_abs == DAMPING_ABS else f"-d{rule.damping_abs:g}"
        name = f"{rule.optimizer}{betas}-{rule.preconditioner}-g{rule.gate_power}{damping}-lr{self.lr:g}-s{self.seed}"
        return folder / f"{name}.json"

    def held_out_loss(self, folder: Path) -> float | None:
        """What it reached; infinity where it diverged; None where it has not run."""
        file = self.file(folder)
        return float(json.loads(file.read_text())["held_out_loss"]) if file.exists() else None


def all_rules(optimizers: list[str], gate_powers: list[float], dampings: list[float]) -> Iterator[Rule]:
    """Every optimizer with every preconditioner, at each gate power (1 is the plain gradient) and damping."""
    for optimizer, betas in (("sgd", None), *(("adamw", pair) for pair in BETAS)):
        if optimizer not in optimizers:
            continue
        yield Rule(optimizer, betas, "none", 1.0, DAMPING_ABS)
        for choice in product(("scaled", "tangent"), gate_powers, dampings):
            yield Rule(optimizer, betas, *choice)


def optim_config(cell: Cell) -> OptimConfig:
    """The cell's optimizer; routers learn at the experts' rate."""
    rule = cell.rule
    return OptimConfig(
        name=rule.optimizer,  # type: ignore[arg-type]
        lr=cell.lr,
        lr_router=None,
        betas=rule.betas or (0.9, 0.999),
        preconditioner=rule.preconditioner,  # type: ignore[arg-type]
        damping_abs=rule.damping_abs,
        warmup_steps=5,
        max_grad_norm=1.0,
    )


class Training:
    """The model of one cell, its fp32 masters and its optimizer."""

    def __init__(self, cell: Cell, task: Task) -> None:
        adapter = AdapterConfig(
            r=4, lora_alpha=16, num_experts=20, top_k=10, target_modules=TARGETS, gate_power=cell.rule.gate_power
        )
        adapter.seed = cell.seed
        self.config = optim_config(cell)
        # torch's fused attention is slower than plain products on a CPU at these lengths
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=DTYPE, attn_implementation="eager")
        inject(model, adapter)
        self.model = model
        found = trainables(model)
        self.parameters = [parameter for _, parameter in found]
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        self.optimizer = ShardOptimizer(
            [(of, master) for (of, _), master in zip(found, self.masters, strict=True)], self.config
        )
        shards = [whole(of, master) for (of, _), master in zip(found, self.masters, strict=True)]
        self.optimizer.bind([ShardGroup(self.optimizer.trainables, shards)])
        self.schedule = build_schedule(self.optimizer, self.config, task.steps)

    def nll_sum(self, batch: MicroBatch) -> Tensor:
        """Sum over the supervised tokens."""
        places_BP, targets_BP = batch.targets()
        logits_BPV = self.model(batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=places_BP).logits
        logits_TV, targets_T = logits_BPV.flatten(0, 1).float(), targets_BP.flatten()
        return nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")

    def step(self, micro_batches: list[MicroBatch]) -> bool:
        """One optimizer step; False where the loss is not finite."""
        for batch in micro_batches:
            loss = self.nll_sum(batch) / batch.num_supervised_global
            if not torch.isfinite(loss):
                return False
            loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return True


def run_cell(cell: Cell, task: Task) -> None:
    """Train one cell and write down what it reached."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ModelConfig(path=str(task.model)))
    train = load_instructions([DataSource(path=str(task.train))], "data.train", tokenizer, task.max_length)
    held_out = load_instructions([DataSource(path=str(task.held_out))], "data.eval", tokenizer, task.max_length)
    training = Training(cell, task)
    steps = train_steps(
        train,
        seed=cell.seed,
        batch_size=task.batch_size,
        micro_batch_size=task.batch_size,
        rank=0,
        world_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    alive = all(training.step(micro_batches) for _, micro_batches in zip(range(task.steps), steps, strict=False))
    loss = loss_on(training, held_out, task, tokenizer.pad_token_id) if alive else math.inf
    cell.file(task.folder).write_text(json.dumps({"held_out_loss": loss if math.isfinite(loss) else math.inf}))
    print(f"{cell.file(task.folder).stem:50s} held-out loss {loss:.4f}", flush=True)


def loss_on(training: Training, rows: InstructionDataset, task: Task, pad_token_id: int) -> float:
    """Mean negative log likelihood per supervised token of about `eval_rows` held-out rows of all lengths."""
    batches = eval_micro_batches(
        rows, micro_batch_size=task.batch_size, rank=0, world_size=1, pad_token_id=pad_token_id
    )
    batches = batches[:: max(1, len(rows) // task.eval_rows)]  # they are sorted by length
    training.model.eval()
    with torch.no_grad():
        total = sum(float(training.nll_sum(batch)) for batch in batches)
    return total / sum(batch.num_supervised_local for batch in batches)


def climb(rule: Rule, task: Task, run: Callable[[Cell], None]) -> None:
    """Try rates from the middle of the grid on, until both neighbours of the best one are worse or off the grid."""
    tried: dict[int, float] = {}

    def loss_at(place: int) -> float:
        if place not in tried:
            cell = Cell(rule, rule.grid[place])
            run(cell)
            tried[place] = cell.held_out_loss(task.folder) or math.inf
        return tried[place]

    best = len(rule.grid) // 2
    while True:
        near = [place for place in (best - 1, best, best + 1) if 0 <= place < len(rule.grid)]
        better = min(near, key=loss_at)
        if better == best:
            return
        best = better


def best_cell(rule: Rule, folder: Path) -> tuple[float, Cell] | None:
    """The best learning rate of a rule so far, and what it reached."""
    cells = [Cell(rule, lr) for lr in rule.grid]
    found = [(loss, cell) for cell in cells if (loss := cell.held_out_loss(folder)) is not None]
    return min(found, key=lambda one: one[0]) if found else None


def run_missing(cell: Cell, task: Task, pool: Executor) -> None:
    """Run a cell unless its result is there."""
    if cell.held_out_loss(task.folder) is None:
        pool.submit(run_cell, cell, task).result()


def print_table(folder: Path, rules: list[Rule]) -> None:
    """Markdown: a line a rule."""
    print(f"\n{setting()}\n")
    print("| optimizer | betas | preconditioner | gate_power | damping_abs | best lr | held-out loss | over seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for rule in rules:
        best = best_cell(rule, folder)
        if best is None:
            continue
        loss, cell = best
        losses = [one for seed in SEEDS if (one := Cell(rule, cell.lr, seed).held_out_loss(folder)) is not None]
        spread = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        betas = "" if rule.betas is None else f"{rule.betas[0]}, {rule.betas[1]}"
        damping = "" if rule.preconditioner == "none" else f"{rule.damping_abs:g}"
        print(
            f"| {rule.optimizer} | {betas} | {rule.preconditioner} | {rule.gate_power:g} | {damping} | {cell.lr:g} "
            f"| {loss:.3f} | {spread} |"
        )


def main() -> None:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="demo", help="folder below .cache/sweep")
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m")
    parser.add_argument("--train", type=Path, default=ROOT / "data/demo/train.jsonl")
    parser.add_argument("--eval", type=Path, default=ROOT / "data/demo/eval.jsonl")
    parser.add_argument("--optimizers", nargs="+", choices=["sgd", "adamw"], default=["sgd", "adamw"])
    parser.add_argument("--gate-powers", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--dampings", type=float, nargs="+", default=[DAMPING_ABS], help="values of damping_abs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there and end")
    args = parser.parse_args()
    folder = ROOT / ".cache" / "sweep" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(folder, args.model, args.train, args.eval, args.steps, args.batch_size, args.eval_rows, args.max_length)
    rules = list(all_rules(args.optimizers, args.gate_powers, args.dampings))
    if not args.table:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool, ThreadPoolExecutor(args.jobs) as threads:
            run = partial(run_missing, task=task, pool=pool)
            list(threads.map(lambda rule: climb(rule, task, run), rules))
            best = [found[1] for rule in rules if (found := best_cell(rule, folder)) is not None]
            list(threads.map(run, [Cell(cell.rule, cell.lr, seed) for seed in SEEDS for cell in best]))
    print_table(folder, rules)


if __name__ == "__main__":
    main()
