"""Seconds of a step as planned, beside those measured: on this machine, calibrated just before.

    python benchmarks/planner_time.py
    python benchmarks/planner_time.py --width 2048 --layers 4      # larger matrices

Two ranks train a model with random weights, of the width of SmolLM2-135M and few layers, in several settings. The plan
is made by the planner's own code with the figures that `launch/doctor.py --calibrate` measures on the same two ranks.
On a machine that has other work to do the figures say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from machine import DTYPE_NAME, setting
from timing import seconds
from transformers import LlamaConfig
from worker import run_ranks

from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.doctor.calibrate import calibrate, write_entry
from dsmoelora.engine import Engine
from dsmoelora.model import random_model
from dsmoelora.parallel import comm
from dsmoelora.parallel.zero_config import merge_config
from dsmoelora.planner import device_named, rehearse, time_of

WORLD_SIZE, LENGTH, NUM_STEPS, NUM_WARM_UP = 2, 256, 5, 3
KEPT: dict[str, Any] = {"stage": 3, "reduce_bucket_size": 5_000_000}
GATHERED = KEPT | {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 3, one row": (KEPT, {"micro_batch_size": 1}),
    "stage 3, four rows": (KEPT, {"micro_batch_size": 4}),
    "stage 3, gathered": (GATHERED, {"micro_batch_size": 4}),
    "stage 3, checkpointing": (KEPT, {"micro_batch_size": 4, "activation_checkpointing": True}),
    "stage 2": ({"stage": 2, "reduce_bucket_size": 5_000_000}, {"micro_batch_size": 4}),
    "stage 0": ({"stage": 0}, {"micro_batch_size": 4}),
}


def recipe_of(folder: str, train: dict[str, Any]) -> Recipe:
    """Experts on attention and feed-forward layers."""
    return Recipe(
        model=ModelConfig(path=folder, dtype=DTYPE_NAME),
        adapter=AdapterConfig(num_experts=8, top_k=2, r=4, target_modules="all-linear"),
        optim=OptimConfig(warmup_steps=0),
        data=DataConfig(max_length=LENGTH),
        train=TrainConfig(batch_size=WORLD_SIZE * 4, **train),
    )


def worker(folder: str) -> None:
    """Calibrate, then plan and train each case; rank 0 prints."""
    entry, path = calibrate(), Path(folder) / "here.yaml"
    comm.together(lambda: write_entry(entry, path) if comm.rank() == 0 else None)
    say(f"{setting()}: {entry}")
    device = device_named(str(path))
    ratios = []
    for name, (zero, train) in CASES.items():
        recipe, deepspeed = recipe_of(folder, train), {"zero_optimization": zero}
        plan = time_of(rehearse(recipe, deepspeed, WORLD_SIZE), device)
        measured = measured_step(recipe, deepspeed)
        ratios.append(plan.step / measured)
        phases = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in plan.phases)
        planned = f"planned {plan.step:6.2f} s ({phases}; {plan.bound})"
        say(f"{name:<24s} {planned}, measured {measured:6.2f} s, {ratios[-1]:.2f}")
    say(f"planned / measured: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def measured_step(recipe: Recipe, deepspeed: dict[str, Any]) -> float:
    """Median seconds of a step; ZeRO-3 learns the order of the modules in the first."""
    config = merge_config(recipe, deepspeed, WORLD_SIZE)
    model = random_model(LlamaConfig.from_pretrained(recipe.model.path), recipe.model, config)
    engine = Engine(recipe, deepspeed, model, cast(Any, None))  # no text, so no tokenizer
    rows = recipe.train.micro_batch_size
    ids_BS = torch.randint(model.config.vocab_size, (rows, LENGTH))
    batch = MicroBatch(ids_BS, torch.ones_like(ids_BS), ids_BS, torch.arange(rows), 1, 1)
    total = recipe.train.batch_size * LENGTH
    batches = [replace(batch, num_supervised_global=total, num_tokens_global=total)]
    batches *= recipe.train.accumulation_steps(WORLD_SIZE)
    found = [seconds(lambda: engine.train_step(batches)) for _ in range(NUM_WARM_UP + NUM_STEPS)]
    return max(comm.all_gather_objects(statistics.median(found[NUM_WARM_UP:])))


def say(text: str) -> None:
    """Print on rank 0."""
    if comm.rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=576, help="of the model")
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    args = parser.parse_args()
    shape = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        vocab_size=8192,
    )
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        run_ranks(__file__, WORLD_SIZE, folder)


if __name__ == "__main__":
    main()
