"""Plain LoRA on the output head, which is called with some positions of a row, learns what it learns in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.config import LossesConfig, ParallelConfig
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, assert_parity, train_on_rank
from tests.plain_training import SGD, make_base, make_recipe, train_plainly


@pytest.mark.parametrize(
    "adapter",
    [
        {"num_experts": 4, "lora_modules": ["lm_head"]},
        {"num_experts": 1, "top_k": 1, "target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["beside-experts", "alone"],
)
def test_plain_lora_on_the_output_head(worker_pool: PoolFactory, tmp_path: Path, adapter: dict[str, Any]) -> None:
    is_routed = "lora_modules" in adapter
    recipe = make_recipe(make_base(tmp_path), adapter=adapter, optim=SGD, max_steps=4)
    recipe = replace(recipe, losses=LossesConfig(balance=0.5 * is_routed))
    expected = train_plainly(recipe)
    assert expected.smallest_gap > 1e-4
    assert expected.weights["lm_head.experts.b"].any()
    for world_size, ep_size in [(2, 1), (2, 2)] if is_routed else [(2, 1)]:
        job = Job(replace(recipe, parallel=ParallelConfig(ep_size)))
        assert_parity(worker_pool(world_size).run(train_on_rank, job), expected, 1e-5)
