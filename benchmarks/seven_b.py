"""A model of Llama-2-7B's shape trains on two CPU ranks: seconds a step and peak memory.

    python benchmarks/seven_b.py

Random weights, made in ZeRO-3 partitions; routed experts on q and v; activation checkpointing; two steps of 64 tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

import torch
from machine import DTYPE_NAME, setting
from transformers import LlamaConfig
from worker import run_ranks

from dsmoelora.callbacks.memory import PeakMemory
from dsmoelora.config import AdapterConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.engine import Engine
from dsmoelora.model import random_model
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.zero_config import merge_config

LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
NUM_TOKENS, NUM_STEPS, WORLD_SIZE = 64, 2, 2
DEEPSPEED = {
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 20_000_000}
}


def worker(num_layers: str) -> None:
    """Build, take two steps, print on rank 0."""
    memory = PeakMemory()
    memory.start()
    recipe = Recipe(
        model=ModelConfig(dtype=DTYPE_NAME),
        adapter=AdapterConfig(target_modules=["q_proj", "v_proj"]),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(batch_size=WORLD_SIZE, micro_batch_size=1, activation_checkpointing=True),
    )
    say(setting())
    start = time.perf_counter()
    shape = LlamaConfig(**LLAMA_2_7B | {"num_hidden_layers": int(num_layers)})
    config = merge_config(recipe, DEEPSPEED, comm.world_size())
    model = random_model(shape, recipe.model, config)
    num_parameters = sum(zero.full_numel(parameter) for parameter in model.parameters())
    no_tokenizer = cast(Any, None)  # neither text nor files in this benchmark
    engine = Engine(recipe, DEEPSPEED, model, no_tokenizer)
    say(f"{num_parameters / 1e9:.2f}B parameters, {engine.num_trainable / 1e6:.1f}M of them in experts and routers")
    say(f"built in {time.perf_counter() - start:.0f} s, peak of a rank {peak(memory):.2f} GiB")
    for step in range(NUM_STEPS):
        start = time.perf_counter()
        result = engine.train_step([random_tokens(step, shape.vocab_size)])
        seconds = time.perf_counter() - start
        say(f"step {step + 1}: loss {result.loss:.4f}, {seconds:.0f} s, peak of a rank {peak(memory):.2f} GiB")


def random_tokens(step: int, vocab_size: int) -> MicroBatch:
    """This rank's half of 64 tokens, all of them supervised."""
    generator = torch.Generator().manual_seed(step * WORLD_SIZE + comm.rank())
    ids = torch.randint(vocab_size, (1, NUM_TOKENS // WORLD_SIZE), generator=generator)
    sequence_ids = torch.tensor([step * WORLD_SIZE + comm.rank()])
    return MicroBatch(ids, torch.ones_like(ids), ids, sequence_ids, NUM_TOKENS - WORLD_SIZE, NUM_TOKENS)


def peak(memory: PeakMemory) -> float:
    """The largest peak of all ranks in GiB (collective)."""
    return float(max(comm.all_gather_objects(memory.gib())))


def say(text: str) -> None:
    """Print on rank 0."""
    if comm.rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"], help="fewer for a quick look")
    args = parser.parse_args()
    run_ranks(__file__, WORLD_SIZE, str(args.layers))


if __name__ == "__main__":
    main()
