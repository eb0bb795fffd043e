"""A run goes on under any layout of its experts, and says and writes the same under each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsmoelora.adapters.experts.similarity import ExpertCosines, cosine_matrix, largest_and_mean
from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, Pieces, Share, batches_of, build_engine, numbers_of, put_together, train_on_rank
from tests.expert_parallel import on_one_device, partitioned, recipe_of
from tests.plain_training import Training, make_base

HALF = 4
QUESTIONS = [Prompt([{"role": "user", "content": text}]) for text in ("ab", "What is it, then?")]


@dataclass(frozen=True)
class Saved:
    """A run on four ranks with two experts' groups, saved half-way; and the same run without a break."""

    recipe: Recipe
    plainly: Training
    root: Path
    first_half: list[Share]
    uninterrupted: Share

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.plainly.weights.items()}


@pytest.fixture(scope="module")
def saved(worker_pool: PoolFactory, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    recipe = recipe_of(make_base(tmp_path_factory.mktemp("base")), "adamw-tangent")
    root = tmp_path_factory.mktemp("run")
    job = Job(partitioned(recipe, 2), accumulation=2)
    first_half = worker_pool(4).run(train_on_rank, replace(job, last_step=HALF, save_to=root))
    return Saved(recipe, on_one_device(recipe)[0], root, first_half, worker_pool(4).run(train_on_rank, job)[0])


@dataclass
class Resumed:
    """What a rank tells after loading: what it holds, says and answers, and how it goes on."""

    numbers: dict[str, Pieces]
    loss: float
    answers: list[str]
    cosines: ExpertCosines
    later_losses: list[float]
    final_loss: float


def resume_on_rank(job: Job, adapter_folder: Path) -> Resumed:
    engine = build_engine(job)
    assert job.load_from is not None
    engine.load(job.load_from)
    numbers = numbers_of(engine)
    loss = engine.evaluate(batches_of(job, 0))
    answers = engine.generate(QUESTIONS, max_new_tokens=8)
    engine.save_adapter(adapter_folder)
    cosines = engine.expert_cosines()
    steps = range(engine.step, job.recipe.train.max_steps)
    later_losses = [engine.train_step(batches_of(job, step)).loss for step in steps]
    return Resumed(numbers, loss, answers, cosines, later_losses, engine.evaluate(batches_of(job, 0)))


LAYOUTS = [(4, 2), (4, 1), (4, 4), (2, 1), (2, 2), (6, 3)]


@pytest.fixture(scope="module")
def resumed(worker_pool: PoolFactory, saved: Saved) -> dict[tuple[int, int], list[Resumed]]:
    """By world size and ep_size, what each rank tells."""
    found = {}
    for world_size, ep_size in LAYOUTS:
        job = Job(partitioned(saved.recipe, ep_size), load_from=saved.root / f"checkpoint-{HALF}")
        folder = saved.root / f"adapter-{world_size}-{ep_size}"
        found[world_size, ep_size] = worker_pool(world_size).run(resume_on_rank, job, folder)
    return found


Everywhere = dict[tuple[int, int], list[Resumed]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_moments_come_back_to_the_last_bit(
    saved: Saved, resumed: Everywhere, layout: tuple[int, int]
) -> None:
    for kind in ("value", "exp_avg", "exp_avg_sq"):
        written = put_together([share.numbers for share in saved.first_half], kind, saved.shapes)
        loaded = put_together([rank.numbers for rank in resumed[layout]], kind, saved.shapes)
        for name, value in loaded.items():
            assert torch.equal(value, written[name]), f"{kind} of {name}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_goes_on_as_if_nothing_had_happened(
    saved: Saved, resumed: Everywhere, layout: tuple[int, int]
) -> None:
    expected = saved.uninterrupted
    for rank in resumed[layout]:
        torch.testing.assert_close(rank.later_losses, expected.losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(rank.final_loss, expected.final_loss, rtol=1e-5, atol=0)


def test_every_layout_evaluates_and_answers_alike(saved: Saved, resumed: Everywhere) -> None:
    expected = resumed[2, 1][0]
    for ranks in resumed.values():
        for rank in ranks:
            assert rank.loss == pytest.approx(expected.loss, rel=1e-5)
            assert rank.loss == pytest.approx(saved.first_half[0].final_loss, rel=1e-5)
            assert rank.answers == expected.answers
    assert any(expected.answers)


def test_every_layout_finds_the_experts_equally_alike(saved: Saved, resumed: Everywhere) -> None:
    values = put_together([share.numbers for share in saved.first_half], "value", saved.shapes)
    for ranks in resumed.values():
        for rank in ranks:
            assert len(rank.cosines.layers) == 4
            for name, largest, mean in zip(rank.cosines.layers, rank.cosines.largest, rank.cosines.mean, strict=True):
                matrix = cosine_matrix(values[f"{name}.experts.a"], values[f"{name}.experts.b"])
                assert [*largest, mean] == pytest.approx(largest_and_mean(matrix).tolist(), rel=1e-4, abs=1e-6)


def test_every_layout_writes_the_same_adapter(saved: Saved, resumed: Everywhere) -> None:
    files = [
        saved.root / f"adapter-{world_size}-{ep_size}" / "adapter_model.safetensors" for world_size, ep_size in resumed
    ]
    assert {path.read_bytes() for path in files} == {files[0].read_bytes()}
    values = put_together([share.numbers for share in saved.first_half], "value", saved.shapes)
    written = load_file(files[0])
    assert set(written) == set(values)
    assert all(torch.equal(written[name], value) for name, value in values.items())
