"""Adapters that stay whole on every rank are not gathered layer by layer; what is optimised stays cut into pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest

from tests.conftest import PoolFactory
from tests.engine_ranks import Job, batches_of, build_engine
from tests.plain_training import make_base, make_recipe

# as in a model that is too large for its weights to stay from one pass to the next
LARGE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
THRESHOLD = "stage3_param_persistence_threshold"


def numbers_gathered(job: Job) -> tuple[int, int, float]:
    """Gathers of a step with its numbers, after a first one, and the share of the masters that lies on this rank."""
    engine = build_engine(job)
    engine.train_step(batches_of(job, 0))
    sizes: list[int] = []
    backend = deepspeed.comm.comm.cdb  # which all of DeepSpeed's gathers come to
    gather = backend.all_gather_into_tensor

    def counted(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output_tensor.numel())
        return gather(output_tensor, *args, **kwargs)

    with mock.patch.object(backend, "all_gather_into_tensor", counted):
        engine.train_step(batches_of(job, 1))
    held = sum(shard.tensor.numel() for shard in engine.optimizer.shards)
    return len(sizes), sum(sizes), held / engine.num_trainable


def test_adapters_above_deepspeeds_threshold_are_gathered_once_a_step(worker_pool: PoolFactory, tmp_path: Path) -> None:
    """Factors of 20,400 numbers and more on a base whose matrices have more; DeepSpeed's threshold is made smaller.

    Four micro-batches, and so each factor was gathered in eight passes.
    """
    base = make_base(tmp_path, hidden_size=170, intermediate_size=340)
    adapter = {"r": 3, "num_experts": 20, "top_k": 2, "target_modules": ["down_proj"]}
    recipe = make_recipe(base, adapter=adapter, optim={"lr": 1e-3})
    found = {}
    for name, threshold in (("cut", 1000), ("kept", 20_400)):
        ranks = worker_pool(2).run(numbers_gathered, Job(recipe, accumulation=4, zero=LARGE | {THRESHOLD: threshold}))
        found[name] = ranks[0]
        assert all(share == pytest.approx(0.5, rel=0.01) for _, _, share in ranks), "masters stay in pieces"
    trained = 20 * 3 * (340 + 170)
    assert found["cut"][1] - found["kept"][1] >= 6 * trained
    assert found["kept"][0] < found["cut"][0]
