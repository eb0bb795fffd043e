"""Bytes and time of the token exchange, beside `ep_size` 1, where ZeRO-3 gathers the experts.

    python benchmarks/exchange.py

Four ranks, ZeRO-3, three layers that read one input (as q, k and v do), random routers, `ep_size` 4. Bytes are
what a rank puts into its collectives in a forward pass, counted by DeepSpeed's comms logger (for `ep_size` 1: gathering
the experts), beside what `parallel.exchange` expects. Times are of forward and backward over gloo on this machine;
beside them, in turn in one run, the same with every collective waited for where it starts, as a share: above 1 the
overlap with the base layer saves time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import deepspeed
import deepspeed.comm as dist
import torch
from blocking import collectives_through, waited_for
from deepspeed.comm.comm import comms_logger
from machine import DTYPE, DTYPE_NAME, setting
from timing import seconds
from torch import Tensor, nn
from worker import run_ranks

from dsmoelora.adapters import inject
from dsmoelora.config import AdapterConfig, ModelConfig, OptimConfig, ParallelConfig, Recipe, TrainConfig
from dsmoelora.optim import ShardOptimizer, trainables
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.exchange import TokenExchange, all_to_all_bytes, gather_bytes
from dsmoelora.parallel.transfer import ALL_TO_ALL_LOG, GATHER_LOG
from dsmoelora.parallel.zero_config import merge_config

WORLD_SIZE = 4
WIDTH = 1024  # in- and out-features
NUM_LAYERS = 3
ITEMSIZE = DTYPE.itemsize
TOLERANCE = 0.02  # of the formulas
NUM_TOKENS = (128, 1024)
EXPERTS = ((20, 10, 4), (8, 7, 4), (8, 2, 16), (16, 2, 64))  # E, K, R


class Block(nn.Module):
    """Three linear layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=DTYPE) for _ in range(NUM_LAYERS))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> scalar, to go backward from."""
        return sum(layer(x_TD).float().square().mean() for layer in (self.q, self.k, self.v))


@dataclass
class Measured:
    """What one way of running the block takes.

    Args:
        mebibytes: that a rank puts into its collectives, forward, in the mean over ranks
        expected: by the formulas
        milliseconds: of forward and backward
        blocking: the same without overlap, as a share of it
    """

    mebibytes: float
    expected: float
    milliseconds: float
    blocking: float


def measure(num_tokens: int, num_experts: int, top_k: int, rank: int, way: str) -> tuple[Measured, str]:
    """Run the block one way; `way` is an exchange, or `ep_size 1`. Also says which way `auto` takes."""
    recipe = Recipe(
        model=ModelConfig(dtype=DTYPE_NAME),
        adapter=AdapterConfig(r=rank, num_experts=num_experts, top_k=top_k, target_modules=["q", "k", "v"]),
        parallel=ParallelConfig(1) if way == "ep_size 1" else ParallelConfig(WORLD_SIZE, cast(Any, way)),
        train=TrainConfig(batch_size=WORLD_SIZE, micro_batch_size=1),
    )
    placement = zero.make_placement(recipe)
    exchange = TokenExchange(placement, recipe.parallel.exchange, top_k)
    torch.manual_seed(0)
    model = Block()
    inject(model, recipe.adapter, placement.local_experts, exchange)
    found = trainables(model)
    zero.place_experts(found, placement)
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=ShardOptimizer(found, OptimConfig()),
        model_parameters=[parameter for _, parameter in found],
        config=merge_config(recipe, config, WORLD_SIZE),
    )
    torch.manual_seed(comm.rank())
    x_TD = torch.randn(num_tokens, WIDTH, dtype=DTYPE, requires_grad=True)
    if placement.ep_size > 1:
        exchange.announce(num_tokens, num_rows=1)

    def forward_and_backward() -> None:
        engine.backward(engine(x_TD))
        engine.step()

    for _ in range(3):  # ZeRO learns the order of its parameters
        forward_and_backward()
    overlapping, blocking = [], []
    for _ in range(5):
        overlapping.append(seconds(forward_and_backward))
        with collectives_through(waited_for):
            blocking.append(seconds(forward_and_backward))
    times = 1e3 * min(overlapping), min(blocking) / min(overlapping)
    dist.configure(enabled=True, prof_all=True, verbose=False)
    comms_logger.comms_dict = {}
    engine(x_TD)
    dist.configure(enabled=False)
    logged = {
        name: sum(size * found[0] for size, found in sizes.items()) for name, sizes in comms_logger.comms_dict.items()
    }
    sizes = (num_tokens, placement, WIDTH, WIDTH, ITEMSIZE)
    if way == "ep_size 1":
        num_bytes = WORLD_SIZE * sum(n for name, n in logged.items() if "all_gather" in name) - base_bytes()
        expected = NUM_LAYERS * ITEMSIZE * num_experts * (2 * WIDTH * rank + WIDTH)  # factors, router
        return Measured(mean_over_ranks(num_bytes) / 2**20, expected / 2**20, *times), ""
    num_bytes = WORLD_SIZE * logged.get(GATHER_LOG, 0) + logged.get(ALL_TO_ALL_LOG, 0)
    both = {
        "gather": gather_bytes(*sizes, NUM_LAYERS),
        "all_to_all": all_to_all_bytes(*sizes, top_k, NUM_LAYERS),
    }
    exchange.kind = "auto"
    chosen = exchange.kind_for(WIDTH, WIDTH, ITEMSIZE)
    return Measured(mean_over_ranks(num_bytes) / 2**20, both[way] / 2**20, *times), chosen


def mean_over_ranks(value: float) -> float:
    """Tokens are not routed quite alike on all ranks."""
    return comm.all_reduce_sum([value])[0] / WORLD_SIZE


def base_bytes() -> int:
    """Gathering the frozen weights of the block."""
    return NUM_LAYERS * WIDTH * WIDTH * ITEMSIZE


def worker(*num_tokens: str) -> None:
    """Measure all rows for some numbers of tokens a rank, print on rank 0."""
    if comm.rank() == 0:
        print(
            f"{setting()}\n\n"
            "| tokens a rank | E, K, R | way | MiB | formula | off by | ms | blocking | auto takes |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
    num_wrong = 0
    for tokens, (num_experts, top_k, rank) in product(map(int, num_tokens), EXPERTS):
        rows = {way: measure(tokens, num_experts, top_k, rank, way) for way in ("gather", "all_to_all", "ep_size 1")}
        cheaper = min(("gather", "all_to_all"), key=lambda way: rows[way][0].mebibytes)
        for way, (found, chosen) in rows.items():
            takes = blocking = ""
            if chosen:
                takes = f"{chosen} ({'cheaper' if chosen == cheaper else 'DEARER'})"
                blocking = f"{found.blocking:.2f}x"
            num_wrong += abs(found.mebibytes / found.expected - 1) > TOLERANCE or chosen not in ("", cheaper)
            if comm.rank() == 0:
                print(
                    f"| {tokens} | {num_experts}, {top_k}, {rank} | {way} | {found.mebibytes:.2f} "
                    f"| {found.expected:.2f} | {100 * (found.mebibytes / found.expected - 1):+.1f}% "
                    f"| {found.milliseconds:.0f} | {blocking} | {takes} |",
                    flush=True,
                )
    if num_wrong:
        raise SystemExit(f"{num_wrong} rows are off by more than {TOLERANCE:.0%}, or auto takes the dearer way there")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, help="of a rank")
    run_ranks(__file__, WORLD_SIZE, *map(str, parser.parse_args().tokens))


if __name__ == "__main__":
    main()
