"""Bytes on the wire per optimizer step of the sharded preconditioner, beside what gathering would take.

    python benchmarks/optimizer_bytes.py

Four ranks, ZeRO-3, a small Llama with half of a 7B model's width. Every collective that `deepspeed.comm` carries while
the optimizer steps is counted.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, cast

import deepspeed.comm as dist
import torch
from machine import setting
from torch import Tensor
from transformers import LlamaConfig
from worker import run_ranks

from dsmoelora.adapters import Factor
from dsmoelora.config import AdapterConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.engine import Engine
from dsmoelora.model import random_model
from dsmoelora.optim import trainables
from dsmoelora.parallel import comm
from dsmoelora.parallel.zero_config import merge_config

WORLD_SIZE = 4
SHAPE = {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "vocab_size": 512}


class Counter:
    """Counts the bytes that this rank hands to each collective of `deepspeed.comm`."""

    def __init__(self) -> None:
        self.num_bytes: dict[str, int] = {}
        self.on = False
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, collective: Any) -> Any:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.on and isinstance(tensor, Tensor):
                self.num_bytes[name] = self.num_bytes.get(name, 0) + tensor.numel() * tensor.element_size()
            return collective(tensor, *args, **kwargs)

        return counted


def worker() -> None:
    """Take a step for each rule and rank R, print on rank 0."""
    counter = Counter()
    if comm.rank() == 0:
        print(setting("fp32"))
    for rule in ("scaled", "tangent"):
        for num_experts, rank in ((20, 4), (8, 16)):
            measure(counter, rule, num_experts, rank)


def measure(counter: Counter, rule: str, num_experts: int, rank: int) -> None:
    """One optimizer step of one configuration."""
    recipe = Recipe(
        model=ModelConfig(dtype="fp32"),
        adapter=AdapterConfig(r=rank, num_experts=num_experts, top_k=2),
        optim=OptimConfig(preconditioner=cast(Any, rule)),
        train=TrainConfig(batch_size=WORLD_SIZE, micro_batch_size=1),
    )
    deepspeed_file = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10_000_000}}
    config = merge_config(recipe, deepspeed_file, comm.world_size())
    model = random_model(LlamaConfig(**SHAPE, num_hidden_layers=2), recipe.model, config)
    engine = Engine(recipe, deepspeed_file, model, cast(Any, None))  # no text, so no tokenizer
    counter.num_bytes.clear()
    engine.optimizer.register_step_pre_hook(lambda *_: setattr(counter, "on", True))
    engine.optimizer.register_step_post_hook(lambda *_: setattr(counter, "on", False))
    ids = torch.arange(8).unsqueeze(0)
    engine.train_step(
        [MicroBatch(ids, torch.ones_like(ids), ids, torch.tensor([comm.rank()]), 7 * WORLD_SIZE, 8 * WORLD_SIZE)]
    )
    factors = [of for of, _ in trainables(model) if of.factor in (Factor.A, Factor.B)]
    gathering = 2 * 4 * sum(math.prod(of.shape) for of in factors)  # factors and gradients in fp32
    sent = sum(counter.num_bytes.values())
    if comm.rank() == 0:
        print(
            f"{rule:8s} E={num_experts:<3d} R={rank:<3d} {counter.num_bytes}: {sent / 2**20:.2f} MiB a step, "
            f"{100 * sent / gathering:.2f}% of the {gathering / 2**20:.0f} MiB of factors and gradients",
            flush=True,
        )


def main() -> None:
    """Start the ranks."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    run_ranks(__file__, WORLD_SIZE)


if __name__ == "__main__":
    main()
