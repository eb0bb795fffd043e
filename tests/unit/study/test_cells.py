"""Cells of `benchmarks/study`, which stop and go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.study.arms import ARMS
from benchmarks.study.bench import Bench, prepare
from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.halving import budgets
from benchmarks.study.stages import stages
from benchmarks.study.state import forget_states
from benchmarks.study.upper import hidden_below
from dsmoelora.adapters import inject
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.config import ModelConfig
from dsmoelora.errors import ConfigError
from dsmoelora.model import load_tokenizer
from tests.helpers import tiny_llama


def test_losses_from_cached_hidden_states_are_those_of_the_whole_model(task: Task) -> None:
    """Of every held-out row, with adapters that change the model, by plain log-probabilities."""
    bench = Bench(task)
    assert len(bench.model.base_model.layers) == 2
    inject(bench.model, ARMS["experts"].adapter_config(0))
    for name, parameter in bench.model.named_parameters():
        if name.endswith("experts.b"):
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    found = bench.held_out_nll()
    whole = AutoModelForCausalLM.from_pretrained(task.model, dtype=bench.model.dtype, attn_implementation="eager")
    base = [_plain_nll(whole, *bench._held_out.sample(row)) for row in bench.eval_rows]
    for place, layer in enumerate(bench.model.base_model.layers, start=4):
        whole.base_model.layers[place] = layer
    expected = [_plain_nll(whole, *bench._held_out.sample(row)) for row in bench.eval_rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.abs(np.subtract(base, expected)).min() > 1e-2 * np.abs(base).min(), "adapters matter"


def _plain_nll(model: Any, ids: list[int], labels: list[int]) -> float:
    with torch.no_grad():
        log_probs_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_probs_SV[place - 1, label]) for place, label in enumerate(labels) if label != -100)


def test_full_depth_adapts_all_layers_and_keeps_nothing(task: Task) -> None:
    bench = Bench(replace(task, depth="full"))
    assert len(bench.model.base_model.layers) == 6 and not bench._hidden
    assert not (task.folder / "hidden").exists()


@pytest.mark.parametrize("arm", ["experts", "gradient", "one-first", "balance", "sigmoid-bias", "falling-k", "svd"])
def test_a_cell_that_stops_goes_on_to_the_same_numbers(task: Task, arm: str) -> None:
    cell = Cell(arm, 4e-3, 1)
    straight = replace(task, folder=task.folder.with_name("straight"))
    Bench(straight).run(cell, 8)
    for until in (2, 4, 8):
        Bench(task).run(cell, until)  # a new one each time, as in a new process
    found, expected = Results.read(cell, task), Results.read(cell, straight)
    assert [one["nll"] for one in found.evaluations] == [one["nll"] for one in expected.evaluations]
    assert [one["step"] for one in found.evaluations] == task.evaluated_at == [2, 4, 8]
    first, last = (sum(found.evaluations[place]["nll"]) for place in (0, -1))
    assert last < first and found.num_trained > 0
    assert [file.name for file in cell.folder(task).iterdir()] == ["results.json"], "a cell at its end needs no state"


def test_one_expert_learns_alone_and_then_all_are_its_copies(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same budget: two steps of eight alone, as plain LoRA of one expert's rank does them; then six together."""
    monkeypatch.setitem(ARMS, "lora", replace(ARMS["lora"], adapter={"num_experts": 1, "top_k": 1, "r": 4}))
    bench, cell = Bench(task), Cell("one-first", 4e-3, 1)
    for one in (cell, Cell("lora", 4e-3, 1)):
        bench.run(one, 2)
    reached = Results.read(cell, task).nll_at(2)
    np.testing.assert_array_equal(reached, Results.read(Cell("lora", 4e-3, 1), task).nll_at(2))
    first, then = stages(cell, task)
    assert (first.begin, first.end, then.begin, then.end) == (0, 2, 2, 8)
    with bench.adapted(then.adapter):
        np.testing.assert_allclose(bench.held_out_nll(), reached, rtol=1e-4)
        for _, layer in adapted_layers(bench.model):
            a_EDR, b_EOR = layer.experts.a, layer.experts.b
            assert len(a_EDR) == 8 and (a_EDR == a_EDR[:1]).all() and (b_EOR == b_EOR[:1]).all() and b_EOR.any()
    bench.run(cell, 8)
    experts = Cell("experts", 4e-3, 1)
    bench.run(experts, 2)
    found = Results.read(cell, task)
    assert found.step == 8 and found.num_trained == Results.read(experts, task).num_trained
    assert found.nll_at(8).sum() < reached.sum()


def test_every_cell_finds_the_base_as_it_was(task: Task) -> None:
    bench = Bench(task)
    before = {name: value.clone() for name, value in bench.model.named_parameters()}
    bench.run(Cell("svd", 1e-3, 0), 2)
    for name, value in bench.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_losses_of_routers_change_what_is_learned(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = replace(ARMS["balance"], losses={"balance": 10.0})
    monkeypatch.setitem(ARMS, "balance", heavy)
    bench = Bench(task)
    for arm in ("experts", "balance"):
        bench.run(Cell(arm, 4e-3, 0), 2)
    found = [Results.read(Cell(arm, 4e-3, 0), task).nll_at(2) for arm in ("experts", "balance")]
    assert not np.array_equal(*found)


def test_a_cell_is_of_its_rows_wherever_they_lie(task: Task, tmp_path: Path) -> None:
    Bench(task).run(Cell("lora", 1e-3), 2)
    copied = tmp_path / "elsewhere.jsonl"
    copied.write_text(task.train.read_text())
    assert Results.read(Cell("lora", 1e-3), replace(task, train=copied)).step == 2
    copied.write_text(task.train.read_text() + "{}\n")
    with pytest.raises(ConfigError, match="was made with other settings"):
        Results.read(Cell("lora", 1e-3), replace(task, train=(tmp_path / "elsewhere.jsonl").rename(tmp_path / "more")))


def test_a_template_of_ones_own_is_what_rows_are_written_with(task: Task) -> None:
    bare = Path(__file__).parents[3] / "benchmarks/study/bare_chatml.jinja"
    bench = Bench(replace(task, template=bare, max_length=512))
    ids, labels = bench._held_out.sample(0)
    row = json.loads(task.held_out.read_text().splitlines()[0])
    text = load_tokenizer(ModelConfig(path=str(task.model))).decode(ids)
    assert text.startswith("<|im_start|>user") and row["output"] in text and "system" not in text
    assert sum(label != -100 for label in labels) > 0


def test_arms_of_one_seed_see_the_same_rows(task: Task) -> None:
    bench = Bench(task)
    assert bench.order(0, 8) != bench.order(1, 8)
    assert bench.order(0, 8)[:16] == bench.order(0, 4)
    assert sorted(bench.order(0, 40)) == list(range(160)), "an epoch has every row once"


def test_held_out_rows_are_looked_at_where_rates_are_compared(task: Task) -> None:
    assert replace(task, num_steps=60).evaluated_at == [15, 30, 60]
    assert replace(task, num_steps=1000).evaluated_at == [125 * part for part in range(1, 9)]
    for num_steps in (1, 2, 3, 7, 300):
        assert set(budgets(num_steps)) <= set(replace(task, num_steps=num_steps).evaluated_at)


def test_a_cell_outlives_keys_that_come_to_the_recipe_later(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have their defaults in it; and a cell that sets one is another cell."""
    Bench(task).run(Cell("lora", 1e-3), 2)
    file = Cell("lora", 1e-3).folder(task) / "results.json"
    saved = json.loads(file.read_text())
    del saved["settings"]["arm"]["optim"]["flat_noise"]
    file.write_text(json.dumps(saved))
    assert Results.read(Cell("lora", 1e-3), task).step == 2
    monkeypatch.setitem(ARMS, "lora", replace(ARMS["lora"], optim={"flat_noise": 0.05}))
    with pytest.raises(ConfigError, match="was made with other settings"):
        Results.read(Cell("lora", 1e-3), task)


def test_a_cell_whose_state_was_forgotten_begins_anew(task: Task) -> None:
    """To the same numbers, as its rows and draws are the same."""
    bench, cell = Bench(task), Cell("lora", 1e-3)
    bench.run(cell, 2)
    bench.run(cell, 4)
    wanted = Results.read(cell, task).evaluations
    forget_states(cell.folder(task))
    bench.run(cell, 8)
    found = Results.read(cell, task).evaluations
    assert [one["step"] for one in found] == sorted({one["step"] for one in found})
    assert [one["nll"] for one in found[: len(wanted)]] == [one["nll"] for one in wanted]


@pytest.mark.parametrize(
    ("other", "told"),
    [({"batch_size": 8}, "batch_size 4, not 8"), ({"dtype": "bf16"}, "dtype fp32, not bf16")],
    ids=str,
)
def test_a_cell_of_other_settings_is_refused(task: Task, other: dict[str, Any], told: str) -> None:
    Bench(task).run(Cell("lora", 1e-3), 2)
    with pytest.raises(ConfigError, match=rf"was made with other settings \({told}\)"):
        Results.read(Cell("lora", 1e-3), replace(task, **other))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_a_recipe(arm: str) -> None:
    config = ARMS[arm].optim_config(1e-3, 60)
    assert config.lr == 1e-3 and config.warmup_steps == 5
    assert ARMS[arm].adapter_config(3).seed == 3


def test_a_cell_is_of_its_model_whatever_that_is_called(task: Task, tmp_path: Path) -> None:
    """Neither its losses nor the hidden states below its layers are another's of the same shape."""
    Bench(task).run(Cell("lora", 1e-3), 2)
    other = replace(task, model=tiny_llama(tmp_path / "other", seed=1, num_hidden_layers=6, initializer_range=0.1))
    with pytest.raises(ConfigError, match="was made with other settings \\(model"):
        Results.read(Cell("lora", 1e-3), other)
    bench = Bench(other)
    (states,) = (found for key, found in bench._hidden.items() if key == id(bench._held_out))
    row = bench.eval_rows[0]
    input_ids = torch.tensor([bench._held_out.sample(row)[0]])
    whole = AutoModelForCausalLM.from_pretrained(other.model, dtype=torch.float32, attn_implementation="eager")
    expected = hidden_below(whole, 4, input_ids, torch.ones_like(input_ids))
    torch.testing.assert_close(states.of([row]), expected)


def test_cells_of_other_held_out_rows_keep_their_targets(task: Task) -> None:
    prepare(task)
    before = task.tokens_file.read_text()
    with pytest.raises(ConfigError, match=r"looked at other held-out rows\. Give their --eval-rows"):
        prepare(replace(task, eval_rows=6))
    assert task.tokens_file.read_text() == before
    prepare(task)
