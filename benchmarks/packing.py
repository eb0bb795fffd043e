"""Packed rows against rows of one sample: supervised tokens a second on samples whose lengths spread 1 to 20.

    python benchmarks/packing.py models/smollm2-135m

Lengths are spread evenly on a log scale, 16 to 320 tokens of which the second half is learned. Both ways go through the
same engine on one process and see the same samples, turn by turn, with the recipe's batch of 8 rows in one forward.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from typing import Any, cast

import numpy as np
from machine import DTYPE_NAME, setting

from dsmoelora.config import DataConfig, ModelConfig, Recipe, TrainConfig
from dsmoelora.data import MicroBatch, Packing, train_steps
from dsmoelora.data.loader import padding_share
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.packing import pack
from dsmoelora.engine import Engine
from dsmoelora.parallel import comm, ranks

SHORTEST, LONGEST, BATCH_SIZE = 16, 320, 8


class Samples:
    """Random tokens, as the loader wants a dataset."""

    def __init__(self, count: int, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        quantiles = rng.permutation((np.arange(count) + 0.5) / count)
        self.num_tokens = np.round(SHORTEST * (LONGEST / SHORTEST) ** quantiles).astype(int)
        self.num_supervised = self.num_tokens // 2
        self.mixture = Mixture([count])
        self._tokens = [rng.integers(vocab_size, size=length).tolist() for length in self.num_tokens]

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels."""
        ids, num_learned = self._tokens[index], int(self.num_supervised[index])
        return ids, [-100] * (len(ids) - num_learned) + ids[len(ids) - num_learned :]


def epoch_of(samples: Samples, packing: Packing | None) -> list[list[MicroBatch]]:
    """The steps of one epoch, in batches of one forward each; what is left over at its end is not taken."""
    num_rows = len(samples.num_tokens) if packing is None else len(packing)
    sizes = {"batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE}
    steps = train_steps(cast(Any, samples), seed=0, rank=0, world_size=1, pad_token_id=0, packing=packing, **sizes)
    return list(islice(steps, num_rows // BATCH_SIZE))


def main() -> None:
    """Train in turn on both, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--samples", type=int, default=192)
    args = parser.parse_args()
    ranks.adopt_launcher_environment()
    comm.init()
    recipe = Recipe(
        model=ModelConfig(path=args.model, dtype=DTYPE_NAME),
        data=DataConfig(max_length=LONGEST, packing=True),
        train=TrainConfig(batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE),
    )
    engine = Engine.build(recipe, {"zero_optimization": {"stage": 3}})
    engine.check_packing()
    samples = Samples(args.samples, engine.model.config.vocab_size)
    packing = pack(samples.num_tokens, LONGEST, seed=0)
    ways = {"apart": epoch_of(samples, None), "packed": epoch_of(samples, packing)}
    rows = {
        "apart": (samples.num_tokens, samples.mixture),
        "packed": (packing.sums(samples.num_tokens), packing.mixture),
    }

    tokens, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for steps in ways.values():  # the first step of each shape allocates
        engine.train_step(steps[0])
    num_turns = len(ways["packed"]) - 1
    for turn in range(num_turns):
        for way, steps in ways.items():
            rest = steps[1:]
            for step in rest[turn * len(rest) // num_turns : (turn + 1) * len(rest) // num_turns]:
                begin = time.perf_counter()
                engine.train_step(step)
                seconds[way] += time.perf_counter() - begin
                tokens[way] += step[0].num_supervised_global
    speed = {way: tokens[way] / seconds[way] for way in ways}
    print(setting())
    for way in ways:
        padding = padding_share(*rows[way], 0, BATCH_SIZE, BATCH_SIZE)
        print(f"{way:6s} {speed[way]:8.1f} supervised tokens/s, {padding:5.1%} padding, {seconds[way]:.0f} s")
    print(f"packed / apart: {speed['packed'] / speed['apart']:.2f}")

    losses = {way: mean_loss(engine, samples, plan) for way, plan in (("apart", None), ("packed", packing))}
    difference = abs(losses["packed"] / losses["apart"] - 1)
    print(
        f"loss per token of all samples: apart {losses['apart']:.6f}, packed {losses['packed']:.6f} ({difference:.1e})"
    )
    comm.shutdown()


def mean_loss(engine: Engine, samples: Samples, packing: Packing | None) -> float:
    """Over the whole epoch as one global batch, so that both ways hold the very same samples."""
    num_rows = len(samples.num_tokens) if packing is None else len(packing)
    sizes = {"batch_size": num_rows, "micro_batch_size": 1}
    steps = train_steps(cast(Any, samples), seed=0, rank=0, world_size=1, pad_token_id=0, packing=packing, **sizes)
    return engine.evaluate(next(steps))


if __name__ == "__main__":
    main()
