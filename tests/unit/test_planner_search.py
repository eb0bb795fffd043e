"""The planner's search against plans made one by one."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsmoelora.cli import parse_command
from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, Recipe, TrainConfig
from dsmoelora.errors import ConfigError
from dsmoelora.planner import (
    Device,
    Search,
    device_named,
    largest_micro_batch,
    micro_batches,
    plan_memory,
    print_search,
    verdict,
)
from dsmoelora.planner.devices import GIB
from tests.helpers import tiny_llama

CUT: dict[str, Any] = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}
FILES = {f"zero{stage}.json": {"zero_optimization": CUT["zero_optimization"] | {"stage": stage}} for stage in (0, 2, 3)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=4)), dtype="bf16"),
        adapter=AdapterConfig(num_experts=4, r=2, top_k=2, target_modules=["q_proj", "v_proj"]),
        data=DataConfig(max_length=64),
        train=TrainConfig(batch_size=24, micro_batch_size=1),
    )


def device_with(num_bytes: float) -> Device:
    """One whose memory takes so many beside its context."""
    device = device_named("l40s")
    return replace(device, memory_gib=device.context_gib + num_bytes / GIB, context_gib=device.context_gib)


def peak_of(recipe: Recipe, rows: int) -> float:
    return plan_memory(replace(recipe, train=replace(recipe.train, micro_batch_size=rows)), CUT, 2).peak


def test_micro_batches_divide_the_global_batch(recipe: Recipe) -> None:
    assert list(micro_batches(recipe, 2)) == [12, 6, 4, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"train\.batch_size is 24, but it must be a multiple of .*1 x 5 = 5"):
        list(micro_batches(recipe, 5))


def test_the_largest_micro_batch_that_fits(recipe: Recipe) -> None:
    """With room for four rows, not for six; tight is not counted as fitting."""
    room = (peak_of(recipe, 4) + peak_of(recipe, 6)) / 2
    context = device_named("l40s").context_gib * GIB
    device = device_with((room + context) / 0.9 - context)
    assert largest_micro_batch(recipe, CUT, 2, device).train.micro_batch_size == 4
    with pytest.raises(ConfigError, match=r"not even train\.micro_batch_size 1 fits 2 x l40s"):
        largest_micro_batch(recipe, CUT, 2, device_with(1000))


def test_the_best_is_the_cheapest_of_those_that_fit(recipe: Recipe) -> None:
    device = device_with(40 * GIB)
    search = Search(recipe, FILES, device)
    best = search.best([1, 2])
    costs = [one.time.step * one.choice.world_size for one in best]
    assert costs == pytest.approx(sorted(costs), rel=0.01)
    assert {(one.choice.world_size, one.choice.deepspeed) for one in best} == {
        (1, "zero2.json"), (1, "zero3.json"), (2, "zero2.json"), (2, "zero3.json")
    }  # fmt: skip
    assert all(verdict_of(recipe, one.choice, device).fits for one in best)
    assert not best[0].choice.checkpointing  # there is room, so nothing is computed again
    (stage_0,) = (text for text in search.refused if "stage of the DeepSpeed file is 0" in text)
    file = io.StringIO()
    print_search(search, best, Console(file=file, width=120))
    assert stage_0 in " ".join(file.getvalue().split())  # lines end where they must
    assert "no layer is computed again" in file.getvalue()
    assert "not looked at: data.packing" in file.getvalue()


def verdict_of(recipe: Recipe, choice: Any, device: Device) -> Any:
    return verdict(plan_memory(choice.put_into(recipe), FILES[choice.deepspeed], choice.world_size), device)


def test_little_memory_takes_checkpointing(recipe: Recipe) -> None:
    """Where a row that keeps its activations is too much, layers are computed again."""
    again = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    peaks = [plan_memory(one, CUT, 2).peak for one in (again, recipe)]
    context = device_named("l40s").context_gib * GIB
    device = device_with((sum(peaks) / 2 + context) / 0.9 - context)
    best = Search(recipe, {"zero3.json": CUT}, device).best([2])
    assert best and all(one.choice.checkpointing and one.choice.micro_batch_size == 1 for one in best)
    assert {one.choice.ep_size for one in best} <= {1, 2}


def test_the_words_that_are_printed_choose_it(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    best = Search(recipe, {str(tmp_path / "zero3.json"): CUT}, device_with(40 * GIB)).best([2])[0]
    command = parse_command(shlex.split(best.choice.overrides()))
    assert command.deepspeed == {"zero_optimization": {"stage": 3}}
    assert command.recipe.train.micro_batch_size == best.choice.micro_batch_size
    assert command.recipe.train.activation_checkpointing == best.choice.checkpointing
    assert command.recipe.parallel.ep_size == best.choice.ep_size
