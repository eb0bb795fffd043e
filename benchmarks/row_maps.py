"""What a rank knows of its shards at large numbers of ranks: seconds and memory of the row maps, on one process.

    python benchmarks/row_maps.py

The project's own code (`parallel.shards`, `optim.preconditioner`) maps the shards of the first, a middle and the last
of W ranks, with stand-ins in place of DeepSpeed's optimizer and of the other ranks' answers: experts on all
linear layers of a model of Llama-2-7B's shape. Both parts run once, at the start of a run; seconds are those while
Python's memory is traced, which makes them longer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmoelora.adapters import inject
from dsmoelora.config import AdapterConfig, OptimConfig
from dsmoelora.optim import trainables
from dsmoelora.optim.preconditioner import Preconditioner
from dsmoelora.optim.rows import ShardGroup, Trainable
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.parallel.shards import shard_groups

EXPERTS = ((20, 4), (5, 12))  # E, R
WORLD_SIZES = (64, 256, 1024, 1008)  # of the last, whole nodes of eight but no power of two, borders cut most rows
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@dataclass(frozen=True)
class StandIn:
    """W ranks of ZeRO-3, of which one is looked at at a time.

    Args:
        found: the trainable tensors, in the order in which ZeRO has them
        world_size: W
    """

    found: list[Trainable]
    world_size: int

    def group_of(self, rank: int, answers: list[str]) -> ShardGroup:
        """The rank's shards, as the engine has them.

        Args:
            rank: of W
            answers: of all ranks, which rows they cut, as `comm.all_gather_objects` receives them
        """
        return self._group_of(rank, lambda _: [json.loads(text) for text in answers])

    def _group_of(self, rank: int, exchange: Callable[[Any], list[Any]]) -> ShardGroup:
        parameters = [self._parameter(of, rank) for of in self.found]
        engine: Any = SimpleNamespace(optimizer=self._optimizer(parameters), zero_optimization=lambda: True)
        placement = ExpertPlacement(self.found[0].shape[0], 1, self.world_size, rank)
        with (
            mock.patch.object(zero.dist, "get_world_size", lambda group=None: self.world_size),
            mock.patch.object(comm, "all_gather_objects", exchange),
        ):
            (group,) = shard_groups(engine, zip(self.found, parameters, strict=True), placement)
        return group

    def answers(self) -> list[str]:
        """Which rows each rank cuts, in the words that travel: what it hands to `comm.all_gather_objects`."""
        answers: list[str] = []

        def hear(own: Any) -> list[Any]:
            answers.append(json.dumps(own))
            return []

        for rank in range(self.world_size):
            self._group_of(rank, hear)
        return answers

    def _parameter(self, of: Trainable, rank: int) -> Any:
        numel = math.prod(of.shape)
        piece = -(-numel // self.world_size)
        return SimpleNamespace(
            ds_shape=of.shape,
            ds_numel=numel,
            partition_numel=lambda: piece,
            ds_zero_partition_rank=rank,
            ds_process_group=None,
        )

    def _optimizer(self, parameters: list[Any]) -> Any:
        optimizer: Any = object.__new__(DeepSpeedZeroOptimizer_Stage3)
        optimizer.fp16_groups = [parameters]
        length = sum(parameter.partition_numel() for parameter in parameters)
        optimizer.fp32_partitioned_groups_flat = [torch.empty(length)]
        optimizer.sub_group_process_groups = [None]
        optimizer.persistent_parameters = []
        return optimizer


def trainables_of(shape: LlamaConfig, num_experts: int, rank: int) -> list[Trainable]:
    """Of a model with experts on all its linear layers, which nobody builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    inject(model, AdapterConfig(num_experts=num_experts, r=rank, target_modules="all-linear"), start=lambda _: None)
    return [of for of, _ in trainables(model)]


def main() -> None:
    """Print a line for each number of ranks."""
    from machine import setting  # beside this file, where it runs as a program

    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(setting("fp32"))
    for num_experts, rank in EXPERTS:
        found = trainables_of(LlamaConfig(**LLAMA_2_7B), num_experts, rank)
        millions = sum(math.prod(of.shape) for of in found) / 1e6
        print(f"E={num_experts} R={rank}: {len(found)} tensors, {millions:.0f}M numbers")
        for world_size in WORLD_SIZES:
            ranks = StandIn(found, world_size)
            answers = ranks.answers()
            for place in (0, world_size // 2, world_size - 1):
                print(f"W={world_size:<5d} rank {place:<5d} {measured(ranks, place, answers)}", flush=True)


def measured(ranks: StandIn, rank: int, answers: list[str]) -> str:
    """What one rank's maps take."""
    tracemalloc.start()
    start = time.perf_counter()
    group = ranks.group_of(rank, answers)
    mapped = time.perf_counter()
    sent = Preconditioner(group, OptimConfig(preconditioner="tangent"), frozen={}).shapes
    done = time.perf_counter()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_bytes = 4 * sum(map(math.prod, sent.values()))
    return (
        f"shards {mapped - start:5.1f} s, preconditioner {done - mapped:5.1f} s, {peak / 2**20:6.0f} MiB of Python's "
        f"objects, {sum(map(len, answers)) / 2**20:5.1f} MiB received, {len(group.cut_rows)} rows cut, "
        f"{num_bytes / 2**20:.1f} MiB a step"
    )


if __name__ == "__main__":
    main()
