"""How experts are used: what is written, and which routers are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoelora.adapters.experts.similarity import ExpertCosines
from dsmoelora.adapters.routing import Routing
from dsmoelora.callbacks import MetricsFile, RouterHealth, TrainingRun
from dsmoelora.callbacks.health import layer_health
from dsmoelora.callbacks.tensorboard import TensorBoard
from dsmoelora.config import AdapterConfig, LossesConfig, Recipe, TrainConfig
from dsmoelora.engine import StepResult

NUM_TOKENS = 100
EVEN, COLLAPSED = [50.0, 50, 50, 50], [100.0, 99, 1, 0]
SPREAD = math.exp(-sum(p * math.log(p) for p in (0.5, 0.495, 0.005)))  # of the collapsed layer's choices
COSINES = ExpertCosines(["one", "two"], [[0.5, -0.25, math.nan, 0.5], [math.nan] * 4], [0.125, math.nan])


def routing(*tokens: list[float], idle: int = 0) -> Routing:
    """Layers in which experts were used by that many of 100 tokens, two experts a token, with equal gates."""
    return Routing(
        num_tokens=NUM_TOKENS,
        layers=[f"layers.{place}.q_proj" for place in range(len(tokens))],
        tokens=list(tokens),
        gates=[[one / 2 for one in layer] for layer in tokens],
        entropy=[NUM_TOKENS * math.log(2)] * len(tokens),
        idle_steps=[[idle if one == 0 else 0 for one in layer] for layer in tokens],
    )


def make_run(folder: Path, *windows: Routing, **recipe: Any) -> TrainingRun:
    """A run whose engine gives these windows one after the other, a look at every second step."""
    waiting = list(windows)
    settings = {"adapter": AdapterConfig(num_experts=4, top_k=2), "train": TrainConfig(health_every=2)} | recipe
    whole = Recipe(**settings)
    engine = SimpleNamespace(recipe=whole, step=0, take_routing=lambda: waiting.pop(0), expert_cosines=lambda: COSINES)
    return TrainingRun(whole, cast(Any, engine), folder, None)


def take_steps(run: TrainingRun, *callbacks: Any, num_steps: int) -> None:
    for callback in callbacks:
        callback.on_train_begin(run)
    for step in range(1, num_steps + 1):
        run.engine.step, run.metrics = step, {"step": step}
        for callback in callbacks:
            callback.on_step_end(run, StepResult(1.0, 1.0, 1e-3, False, 1, 1))
        for callback in callbacks:
            callback.on_metrics(run)
        run.tables.clear()
    for callback in callbacks:
        callback.on_train_end(run)


def test_every_second_line_has_the_experts_of_every_layer(tmp_path: Path) -> None:
    run = make_run(tmp_path, routing(EVEN, COLLAPSED, idle=50))
    take_steps(run, RouterHealth(), MetricsFile(), TensorBoard(), num_steps=3)
    first, second, third = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "experts" not in first and "experts" not in third
    assert second["experts"] == {
        "layers": ["layers.0.q_proj", "layers.1.q_proj"],
        "share": [[0.5] * 4, [1.0, 0.99, 0.01, 0.0]],
        "gate": [[0.25] * 4, [0.5, 0.495, 0.005, 0.0]],
        "entropy": [round(math.log(2), 4)] * 2,
        "dead": {"layers.1.q_proj": [3]},
    }
    assert second["cosines"] == {
        "layers": ["one", "two"],
        "largest": [[0.5, -0.25, None, 0.5], [None] * 4],
        "mean": [0.125, None],
    }
    assert (second["experts/cosine_mean"], second["experts/cosine_max"]) == (0.125, 0.5)
    assert second["experts/share_max"] == 1.0
    assert second["experts/dead"] == 1.0
    assert second["experts/entropy"] == pytest.approx(math.log(2))
    assert second["experts/effective"] == pytest.approx((4 + SPREAD) / 2)

    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"experts/share", "experts/gate", "experts/cosine"} <= set(curves.Tags()["images"])
    (image,) = curves.Images("experts/share")
    assert (image.step, image.height, image.width) == (2, 2 * 8, 4 * 8)
    scalars = set(curves.Tags()["scalars"])
    assert {"experts/dead", "experts/cosine_max", "experts_entropy/layers.1.q_proj", "experts_cosine/one"} <= scalars
    assert "experts_cosine/two" not in scalars


def test_before_the_first_step_updates_have_no_direction(tmp_path: Path) -> None:
    run = make_run(tmp_path, routing(EVEN))
    cast(Any, run.engine).expert_cosines = lambda: ExpertCosines(["one"], [[math.nan] * 4], [math.nan])
    take_steps(run, RouterHealth(), MetricsFile(), num_steps=2)
    *_, line = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["experts/cosine_mean"] is None and line["experts/cosine_max"] is None
    assert line["cosines"]["largest"] == [[None] * 4]


def test_an_expert_is_dead_only_after_a_while() -> None:
    assert layer_health(routing(COLLAPSED, idle=49), 0, dead_after=50).dead == []
    assert layer_health(routing(COLLAPSED, idle=50), 0, dead_after=50).dead == [3]


def test_a_collapsed_router_is_named_once_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sick, well = routing(EVEN, COLLAPSED), routing(EVEN, EVEN)
    run = make_run(tmp_path, well, sick, sick, well, sick)
    take_steps(run, RouterHealth(), num_steps=10)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2, "at its first collapse, and when it collapsed again"
    spread = f"{SPREAD:.1f} of 4 experts"
    for part in ("1 of 2 routers", "layers.1.q_proj", spread, "losses.balance to 0.01", "optim.lr_router"):
        assert part in texts[0]
    assert "layers.0.q_proj" not in texts[0]


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ({"losses": LossesConfig(balance=0.01)}, "Raise losses.balance (now 0.01)"),
        ({"adapter": AdapterConfig(num_experts=4, top_k=2, router="sigmoid_bias")}, "Raise adapter.bias_rate"),
        ({"adapter": AdapterConfig(num_experts=4, router="softmax")}, "Set losses.z"),
    ],
)
def test_the_remedy_is_one_that_the_recipe_can_follow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recipe: dict[str, Any], remedy: str
) -> None:
    take_steps(make_run(tmp_path, routing(COLLAPSED), **recipe), RouterHealth(), num_steps=2)
    assert remedy in caplog.text


@pytest.mark.parametrize("num_experts", [2, 4, 20])
@pytest.mark.parametrize("top_k", [1, 2])
def test_even_and_mildly_uneven_use_is_no_collapse(num_experts: int, top_k: int) -> None:
    if top_k == num_experts:
        return
    mild = [2.0] + [1.0] * (num_experts - 1)
    tokens = [one / sum(mild) * NUM_TOKENS * top_k for one in mild]
    assert not layer_health(routing(tokens), 0, 50).collapsed
    few = [float(NUM_TOKENS)] * top_k + [0.0] * (num_experts - top_k)
    assert layer_health(routing(few), 0, 50).collapsed


def test_where_all_experts_are_used_the_gates_decide() -> None:
    def dense(gates: list[float]) -> Routing:
        return Routing(NUM_TOKENS, ["layer"], [[float(NUM_TOKENS)] * 4], [gates], [1.0], [[0] * 4])

    assert not layer_health(dense([40.0, 20, 20, 20]), 0, 50).collapsed
    assert layer_health(dense([99.0, 1, 0, 0]), 0, 50).collapsed


def test_no_look_without_routers_or_when_switched_off(tmp_path: Path) -> None:
    empty = Routing(NUM_TOKENS, [], [], [], [], [])
    take_steps(make_run(tmp_path, empty), RouterHealth(), num_steps=2)
    off = make_run(tmp_path, train=TrainConfig(health_every=0))
    take_steps(off, RouterHealth(), num_steps=3)
    assert "experts/dead" not in off.metrics
