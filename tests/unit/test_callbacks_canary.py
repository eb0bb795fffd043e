"""The canary names the tensors that take no part in training, and is silent otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest

from dsmoelora.callbacks import Canary, TrainingRun
from dsmoelora.config import AdapterConfig, Recipe, TrainConfig
from dsmoelora.engine import StepResult
from tests.fake_engine import FakeEngine

GOOD = {"grad_norm": 0.1, "moved": 0.01}


def watch(
    statistics: dict[str, dict[str, float]], num_steps: int = 5, skipped: tuple[int, ...] = (), **adapter: Any
) -> list[Any]:
    """`canary/dead_tensors` after each step, None where there is none."""
    recipe = Recipe(adapter=AdapterConfig(**adapter), train=TrainConfig(max_steps=num_steps))
    engine = FakeEngine(recipe, statistics=statistics)
    run = TrainingRun(engine.recipe, cast(Any, engine), Path("unused"), None)
    canary, found = Canary(), []
    canary.on_train_begin(run)
    for step in range(1, num_steps + 1):
        run.metrics = {}
        canary.on_step_end(run, StepResult(1.0, 1.0, 1e-3, step in skipped, 1, 1))
        found.append(run.metrics.get("canary/dead_tensors"))
    return found


def test_it_is_silent_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    assert watch({"q.a": GOOD, "q.b": GOOD}) == [None, None, 0.0, None, None]
    assert not caplog.records


def test_it_names_what_got_no_gradient_and_what_did_not_move(caplog: pytest.LogCaptureFixture) -> None:
    dead = {"grad_norm": 0.0, "moved": 0.0}
    statistics = {
        "q.a": GOOD,
        "q.b": dead,
        "v.a": {"grad_norm": 1.0, "moved": 0.0},
        "v.b": {**GOOD, "grad_norm": math.nan},
    }
    assert watch(statistics)[2] == 3.0
    first, second = (record.getMessage() for record in caplog.records)
    assert "2 of 4 adapter tensors received no gradient" in first and "q.b, v.b" in first
    assert "1 of 4 adapter tensors did not move" in second and "v.a" in second


def test_a_module_that_no_prompt_has_chosen_may_rest(caplog: pytest.LogCaptureFixture) -> None:
    dead, milora = {"grad_norm": 0.0, "moved": 0.0}, {"style": "decoder_layer", "router": "prompt", "num_experts": 7}
    statistics = {"layers.0.router.weight": GOOD, "layers.0.q_proj.experts.a": dead}
    assert watch(statistics, **milora)[2] == 0.0
    assert watch({"layers.0.router.weight": dead}, **milora)[2] == 1.0
    assert watch({"layers.0.o_proj.experts.a": dead}, **milora, lora_modules=["o_proj"])[2] == 1.0
    assert watch({"layers.0.q_proj.experts.a": {**dead, "grad_norm": math.nan}}, **milora)[2] == 1.0


def test_skipped_steps_do_not_count() -> None:
    assert watch({"q.a": GOOD}, skipped=(1, 3)) == [None, None, None, None, 0.0]


def test_a_run_too_short_to_judge_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    assert watch({"q.a": {"grad_norm": 0.0, "moved": 0.0}}, num_steps=2) == [None, None]
    assert not caplog.records
