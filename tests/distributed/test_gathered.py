"""How much of the base ZeRO-3 has gathered at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import PoolFactory
from tests.engine_ranks import Job, batches_of, build_engine
from tests.helpers import tiny_llama
from tests.plain_training import make_recipe

NUM_LAYERS, WIDTH, VOCABULARY = 6, 64, 260


def numbers_that_are_whole(job: Job) -> list[int]:
    """Numbers of all whole parameters each time that a layer is called, also to be computed again."""
    engine = build_engine(job)
    found: list[int] = []
    model = engine.model

    def look(*_: Any) -> None:
        found.append(sum(parameter.numel() for parameter in model.parameters()))

    engine.train_step(batches_of(job, 0))  # in which ZeRO-3 learns nothing yet
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(look)
    engine.train_step(batches_of(job, 1))
    return found


def test_checkpointing_gathers_a_layer_at_a_time(tmp_path: Path, worker_pool: PoolFactory) -> None:
    """The last linear layer has experts: whatever is computed again with it must not stay to the end."""
    base = tiny_llama(tmp_path, num_hidden_layers=NUM_LAYERS, hidden_size=WIDTH)
    recipe = make_recipe(base, adapter={"target_modules": "all-linear"}, optim={}, max_steps=2)
    recipe.train.activation_checkpointing = True
    zero = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (found, _) = worker_pool(2).run(numbers_that_are_whole, Job(recipe, zero=zero))
    assert len(found) == 2 * NUM_LAYERS, "each layer is called twice"
    in_head = VOCABULARY * WIDTH
    per_layer = 2 * WIDTH**2 + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 128
    assert torch.tensor(found).max() < 2 * per_layer + in_head < NUM_LAYERS * per_layer
