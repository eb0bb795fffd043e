"""`benchmarks/study`: its tasks, cells that stop and go on, and the tables that are made of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.study import __main__ as study
from benchmarks.study.arms import ARMS
from benchmarks.study.bench import Bench, prepare
from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.halving import budgets
from benchmarks.study.paired import halves
from benchmarks.study.report import table
from benchmarks.study.search import Chosen, search
from benchmarks.study.stages import stages
from benchmarks.study.state import forget_states
from benchmarks.study.tasks import CONFLICTING, task_files
from dsmoelora.adapters import inject
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.config import ModelConfig
from dsmoelora.errors import ConfigError
from dsmoelora.model import load_tokenizer
from tests.helpers import tiny_llama

# Every table of the docs: page, study and task, arms with the control first.
SHOWN = (
    ("choosing", "short/conflicting", "lora experts gradient"),
    ("choosing", "long/conflicting", "lora experts"),
    ("choosing", "thousand/conflicting", "lora experts"),
    (
        *("choosing", "short/demo"),
        "lora experts slow-routers lora-active lora-gradient gradient short-betas"
        " lora-short-betas betas-0.99 lora-betas-0.99 lora-plus",
    ),
    ("choosing", "short/demo", "experts experts-4-2 experts-20-10 balance sigmoid-bias falling-k svd"),
    ("choosing", "long/demo", "lora experts"),
    ("choosing", "thousand/demo", "lora experts"),
    ("choosing", "recipe/demo", "lora-80 experts-20-10 slow-20-10 gradient-20-10 short-20-10"),
    ("choosing", "short/qa", "lora experts dense shared"),
    ("choosing", "long/qa", "lora experts"),
    ("riemannian", "short/demo", "experts scaled scaled-0.01 tangent tangent-0.01 short-betas betas-0.99 lora-plus"),
    (
        *("riemannian", "short/demo"),
        "sgd sgd-scaled-1e-06 sgd-scaled-0.01 sgd-scaled-1 sgd-tangent-1e-06 sgd-tangent-0.01 sgd-tangent-1",
    ),
    ("riemannian", "short/qa", "sgd sgd-scaled-1e-06 sgd-scaled-0.01 sgd-tangent-0.01"),
)

# Tasks


def test_conflicting_tasks_say_different_things_of_one_input(tmp_path: Path) -> None:
    files = task_files("conflicting", tmp_path, tmp_path, tmp_path)
    train, held_out = ([json.loads(line) for line in file.read_text().splitlines()] for file in vars(files).values())
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    for rows in (train, held_out):
        of_input: dict[str, list[str]] = {}
        for row in rows:
            of_input.setdefault(row["input"], []).append(row["output"])
        assert {len(outputs) for outputs in of_input.values()} == {len(CONFLICTING)}
        assert all(len(set(outputs)) >= len(CONFLICTING) - 2 for outputs in of_input.values())
    answers = [answer(["desert", "apple", "ladder"]) for answer in CONFLICTING.values()]
    assert answers == [
        *("ladder apple desert", "apple desert ladder", "DESERT APPLE LADDER", "d a l", "ladder", "desert", "6 5 6"),
        "tresed elppa reddal",
    ]


def test_questions_have_their_choices_in_the_input(tmp_path: Path) -> None:
    row = {"instruction": "Why?", "input": "", "output": "so", "choices": ["so", "no"], "answer": 0}
    for name in ("commonsenseqa/train", "openbookqa/train", "arc_easy/train", "commonsenseqa/dev", "arc_easy/dev"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(row) + "\n")
    files = task_files("qa", tmp_path / "study", tmp_path, tmp_path)
    expected = {"instruction": "Why?", "input": "- so\n- no", "output": "so"}
    for file, count in ((files.train, 3), (files.held_out, 2)):
        assert [json.loads(line) for line in file.read_text().splitlines()] == count * [expected]
    with pytest.raises(ConfigError, match=r"There is no .*gsm8k"):
        task_files("gsm8k", tmp_path / "study", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="--tasks is 'mine', but it must be one of demo, qa, gsm8k, conflicting"):
        task_files("mine", tmp_path, tmp_path, tmp_path)


# Cells


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A model of six layers, 160 rows to learn from, 40 that are held out."""
    folder = tmp_path_factory.mktemp("study")
    found = {"model": tiny_llama(folder / "model", num_hidden_layers=6, initializer_range=0.1)}
    files = task_files("conflicting", folder, folder, folder)
    for name, file, count in (("train", files.train, 160), ("held_out", files.held_out, 40)):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield found


@pytest.fixture
def task(tmp_path: Path, material: dict[str, Path]) -> Task:
    """Two layers of six are adapted; 8 steps of 4 rows, 12 held-out rows."""
    sizes = {"num_steps": 8, "batch_size": 4, "eval_rows": 12, "max_length": 256}
    settings: dict[str, Any] = {
        **sizes,
        "depth": "third",
        "dtype": "fp32",
        "seeds": (0, 1),
        "rate_seeds": (0, 1),
        "template": None,
    }
    return Task(tmp_path / "study" / "conflicting", **material, **settings)


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
    bare = Path(__file__).parents[2] / "benchmarks/study/bare_chatml.jinja"
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


def test_a_study_is_searched_and_told(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(task)
    bench = Bench(task)

    def train(cells: Sequence[Cell], until: int) -> None:
        for cell in cells:
            bench.run(cell, until)

    for arm in ("experts", "lora"):
        search(task, arm, train)
    chosen = Chosen.read(task, "lora")
    assert chosen is not None and chosen.lr in map(float, chosen.tried)
    assert chosen.tried[f"{chosen.lr:g}"] == min(chosen.tried.values())
    lines = table(task, ["experts", "lora"])
    assert len(lines) == 6
    assert lines[4].startswith("| experts |") and lines[5].startswith("| lora |")
    assert not list(task.folder.rglob("state*"))


@pytest.mark.parametrize(("rate_seeds", "expected"), [((0,), 4e-3), ((0, 1), 2e-3)])
def test_a_rate_is_chosen_by_all_seeds_that_may(task: Task, rate_seeds: tuple[int, ...], expected: float) -> None:
    """A rate that is best for one seed and bad for the other loses to one that is good for both."""
    task = replace(task, rate_seeds=rate_seeds)
    task.folder.mkdir(parents=True)
    task.tokens_file.write_text("[1, 1]")
    losses = {(4e-3, 0): 1.0, (4e-3, 1): 2.0, (2e-3, 0): 1.1, (2e-3, 1): 1.1}
    trained = set()

    def train(cells: Sequence[Cell], until: int) -> None:
        for cell in cells:
            trained.add((cell.lr, cell.seed))
            results = Results.read(cell, task)
            nll = 2 * [losses.get((cell.lr, cell.seed), 3.0)]
            results.evaluations = [{"step": step, "seconds": 1.0, "nll": nll} for step in (2, 4, 8) if step <= until]
            cell.folder(task).mkdir(parents=True, exist_ok=True)
            results.write(cell.folder(task))

    search(task, "lora", train)
    chosen = Chosen.read(task, "lora")
    assert chosen is not None and chosen.lr == expected
    assert chosen.tried[f"{expected:g}"] == pytest.approx(1.0 if len(rate_seeds) == 1 else 1.1)
    assert {(expected, seed) for seed in task.seeds} <= trained


def test_a_table_by_hand(task: Task) -> None:
    """Two seeds, four rows of two targets; of the reporting half every row of the others is 0.2 below the control."""
    task.folder.mkdir(parents=True)
    task.tokens_file.write_text("[2, 2, 2, 2]")
    _, reporting = halves(4)
    for arm, less, seeds in (
        ("experts", 0.0, (0, 1)),
        ("lora", 0.4, (0, 1)),
        ("gradient", 0.4, (1,)),
        ("dense", 0.0, (0,)),
    ):
        Chosen.file(task, arm).parent.mkdir()
        Chosen.file(task, arm).write_text(json.dumps({"lr": 1e-3, "tried": {}}))
        for seed in seeds:
            cell = Cell(arm, 1e-3, seed)
            results = Results.read(cell, task)
            results.num_trained = 1234
            for step in (4, 8):
                nll_N = np.full(4, 99.0)
                nll_N[reporting] = 6.0 + seed - step / 4 - less
                results.evaluations.append({"step": step, "seconds": 10.0 * step, "nll": nll_N.tolist()})
            cell.folder(task).mkdir()
            results.write(cell.folder(task))
    title, _, _, _, control, lora, gradient = table(task, ["experts", "lora", "gradient"])
    assert "standard deviation over its seeds: 0.3536" in title
    cells = [cell.strip() for cell in control.strip("|").split("|")]
    assert cells == ["experts", ARMS["experts"].why, "1,234", "2", "0.001", "2.2500 ± 0.3536", "", "8", "80"]
    cells = [cell.strip() for cell in lora.strip("|").split("|")]
    # the control ends at 2.25, and at 2.5 with the second seed; others fall by 0.5 between steps 4 and 8
    assert cells[5:] == ["2.0500 ± 0.3536", "-0.2000 [-0.2000, -0.2000]", "6", "80"]
    cells = [cell.strip() for cell in gradient.strip("|").split("|")]
    assert cells[3:] == ["1", "0.001", "2.3000", "-0.2000 [-0.2000, -0.2000]", "6", "80"]
    assert "| no seed in common |" in table(task, ["dense", "gradient"])[-1]
    assert table(task, ["experts", "shared", "svd"])[-1] == "Not at their end: shared, svd."


@pytest.mark.parametrize(("page", "shown", "arms"), SHOWN)
def test_the_tables_of_the_docs_are_made_of_the_cells_that_lie_here(
    page: str, shown: str, arms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever model and rows are: cells know them by content."""
    root = Path(__file__).parents[2]
    shutil.unpack_archive(root / f"benchmarks/study/results/{Path(shown).parent}.tar.xz", tmp_path)
    folder, control, *others = tmp_path / shown, *arms.split()
    settings = json.loads(next(folder.glob(f"{control}/lr*/results.json")).read_text())["settings"]["task"]
    digests = {key: settings.pop(key) for key in ("model", "template", "train", "held_out")}
    monkeypatch.setattr("benchmarks.study.cells._digest", lambda path: digests[path.name])
    paths: Any = {key: Path(key) for key in digests}
    lines = table(Task(folder, **paths, **settings, seeds=tuple(range(10)), rate_seeds=()), [control, *others])
    assert len(lines) == 5 + len(others)
    assert "\n".join(lines) in (root / f"docs/{page}.md").read_text()


def test_a_cell_that_diverges_ends_and_counts_as_worst(task: Task) -> None:
    """And a table says so instead of leaving it out in silence."""
    prepare(task)
    bench, cell = Bench(task), Cell("sgd", 1e60)
    bench.run(cell, 8)
    results = Results.read(cell, task)
    assert results.diverged_at is not None and results.is_done(8)
    assert results.loss_at(8, bench.tokens_N, [0, 1]) == math.inf
    Chosen.file(task, "sgd").write_text(json.dumps({"lr": 1e60, "tried": {}}))
    assert table(task, ["sgd"]) == ["conflicting: the control (sgd) has not come to its end."]


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_a_recipe(arm: str) -> None:
    config = ARMS[arm].optim_config(1e-3, 60)
    assert config.lr == 1e-3 and config.warmup_steps == 5
    assert ARMS[arm].adapter_config(3).seed == 3


def test_the_list_of_arms_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ARMS)
