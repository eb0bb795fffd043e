"""Rates that are searched, and the tables that are made of cells."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.arms import ARMS
from benchmarks.study.bench import Bench, prepare
from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.paired import halves
from benchmarks.study.report import table
from benchmarks.study.search import Chosen, search

# Every table of the docs: page, study and task, arms with the control first.
SHOWN = (
    ("choosing", "short/conflicting", "lora experts lora-active dense shared falling-k gradient"),
    (
        *("choosing", "long/conflicting"),
        "lora experts lora-active lora-12 dense shared slow-routers falling-k experts-20-10 short-betas"
        " lora-short-betas",
    ),
    (
        *("choosing", "long/conflicting"),
        "experts lora-active lora-12 dense shared slow-routers falling-k experts-20-10 short-betas",
    ),
    ("choosing", "long/conflicting", "shared lora-12"),
    ("choosing", "thousand/conflicting", "lora experts shared"),
    (
        *("choosing", "short/demo"),
        "lora experts slow-routers lora-active lora-svd lora-gradient gradient short-betas"
        " lora-short-betas betas-0.99 lora-betas-0.99 lora-plus",
    ),
    (
        "choosing",
        "short/demo",
        "experts experts-4-1 experts-4-2 experts-8-1 experts-8-4 experts-20-2 experts-20-10 dense shared slow-routers"
        " balance sigmoid-bias falling-k svd one-first",
    ),
    ("choosing", "long/demo", "lora experts shared"),
    ("choosing", "thousand/demo", "lora experts"),
    ("choosing", "recipe/demo", "lora-80 experts-20-10 slow-20-10 gradient-20-10 short-20-10"),
    ("choosing", "short/gsm8k", "lora experts shared"),
    ("choosing", "short/qa", "lora experts dense shared short-betas lora-short-betas"),
    ("choosing", "long/qa", "lora experts"),
    ("choosing", "thousand/qa", "lora experts"),
    ("riemannian", "short/demo", "experts scaled scaled-0.01 tangent tangent-0.01 short-betas betas-0.99 lora-plus"),
    ("riemannian", "short/qa", "experts scaled tangent short-betas"),
    (
        *("riemannian", "short/demo"),
        "sgd sgd-scaled-1e-06 sgd-scaled-0.01 sgd-scaled-1 sgd-tangent-1e-06 sgd-tangent-0.01 sgd-tangent-1",
    ),
    ("riemannian", "short/qa", "sgd sgd-scaled-1e-06 sgd-scaled-0.01 sgd-tangent-0.01"),
)


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
    root = Path(__file__).parents[3]
    shutil.unpack_archive(root / f"benchmarks/study/results/{Path(shown).parent}.tar.xz", tmp_path)
    folder, control, *others = tmp_path / shown, *arms.split()
    settings = json.loads(next(folder.glob(f"{control}/lr*/results.json")).read_text())["settings"]["task"]
    digests = {key: settings.pop(key) for key in ("model", "template", "train", "held_out")}
    monkeypatch.setattr("benchmarks.study.cells._digest", lambda path: digests[path.name])
    paths: Any = {key: Path(key) for key in digests}
    lines = table(Task(folder, **paths, **settings, seeds=tuple(range(10)), rate_seeds=()), [control, *others])
    assert len(lines) == 5 + len(others)
    assert "\n".join(lines) in (root / f"docs/{page}.md").read_text()


def test_the_overview_repeats_the_tables() -> None:
    """Of each kind of data and number of steps, the mixture against plain LoRA."""
    text = (Path(__file__).parents[3] / "docs/choosing.md").read_text()
    header, *rows = re.findall(r"^\| .*`.*|^\| data \|.*", text.split("\n**")[1], re.MULTILINE)
    for row in rows:
        _, label, *differences, _ = row.split("|")
        (task,) = re.findall(r"`(\w+)`", label)
        for steps, difference in zip(re.findall(r"(\d[\d,]*) steps", header), differences, strict=True):
            of_task = text.split(f"\n{task}: {steps.replace(',', '')} steps of 4 rows, ")[1]
            found = next(line for line in of_task.splitlines() if line.startswith("| experts |"))
            assert found.split("|")[7] == difference


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


def test_the_list_of_arms_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ARMS)
