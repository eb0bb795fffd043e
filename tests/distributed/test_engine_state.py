"""Going on from a checkpoint under any number of ranks, and what a trained adapter says without DeepSpeed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsmoelora import load_adapter
from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.conftest import PoolFactory
from tests.engine_ranks import (
    Job,
    Share,
    assert_bf16_goes_on_to_the_last_bit,
    batches_of,
    build_engine,
    numbers_of,
    put_together,
    train_on_rank,
)
from tests.plain_training import METHODS, global_batch, make_base, make_recipe, train_plainly

HALF, WHOLE = 4, 8
QUESTIONS = [Prompt([{"role": "user", "content": text}]) for text in ("ab", "What is it, then?")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Eight steps, with all tokens away from the border between two experts."""
    base = make_base(tmp_path_factory.mktemp("base"))
    recipe = make_recipe(base, **METHODS["adamw-short"])
    assert train_plainly(recipe).smallest_gap > 1e-4
    return recipe


@dataclass(frozen=True)
class Saved:
    """A run of eight steps on four ranks, saved after the fourth."""

    folder: Path
    first_half: list[Share]
    uninterrupted: list[Share]


@pytest.fixture(scope="module")
def saved(worker_pool: PoolFactory, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("run")
    first_half = worker_pool(4).run(train_on_rank, Job(recipe, 2, last_step=HALF, save_to=root))
    return Saved(root / f"checkpoint-{HALF}", first_half, worker_pool(4).run(train_on_rank, Job(recipe, 2)))


def load_and_look(job: Job) -> Share:
    """What a rank holds right after loading."""
    engine = build_engine(job)
    assert job.load_from is not None
    engine.load(job.load_from)
    return Share([], [], [], engine.evaluate(batches_of(job, 0)), engine.optimizer.num_steps, numbers_of(engine))


def shapes_in(recipe: Recipe) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in train_plainly(recipe).weights.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_and_moments_come_back_to_the_last_bit_on_any_number_of_ranks(
    worker_pool: PoolFactory, recipe: Recipe, saved: Saved, world_size: int
) -> None:
    shares = worker_pool(world_size).run(load_and_look, Job(recipe, load_from=saved.folder))
    shapes = shapes_in(recipe)
    for kind in ("value", "exp_avg", "exp_avg_sq"):
        written = put_together([share.numbers for share in saved.first_half], kind, shapes)
        loaded = put_together([share.numbers for share in shares], kind, shapes)
        for name, value in loaded.items():
            assert torch.equal(value, written[name]), f"{kind} of {name}"
    for share in shares:
        assert share.num_optimizer_steps == HALF
        assert share.final_loss == pytest.approx(saved.first_half[0].final_loss, rel=1e-5), "the model speaks with them"


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_number_of_ranks_goes_on_as_if_nothing_had_happened(
    worker_pool: PoolFactory, recipe: Recipe, saved: Saved, world_size: int
) -> None:
    job = Job(recipe, accumulation=2, first_step=HALF, load_from=saved.folder)
    for share in worker_pool(world_size).run(train_on_rank, job):
        expected = saved.uninterrupted[0]
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(share.grad_norms, expected.grad_norms[HALF:], rtol=1e-4, atol=0)
        assert share.lrs == expected.lrs[HALF:]
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=1e-5, atol=0)


def test_the_same_ranks_go_on_to_the_last_bit(worker_pool: PoolFactory, recipe: Recipe, saved: Saved) -> None:
    job = Job(recipe, accumulation=2, first_step=HALF, load_from=saved.folder)
    for share, expected in zip(worker_pool(4).run(train_on_rank, job), saved.uninterrupted, strict=True):
        assert share.losses == expected.losses[HALF:]
        assert share.grad_norms == expected.grad_norms[HALF:]
        assert share.final_loss == expected.final_loss
        for kind, pieces in share.numbers.items():
            for name, runs in pieces.items():
                for (start, stop, numbers), other in zip(runs, expected.numbers[kind][name], strict=True):
                    assert (start, stop) == other[:2]
                    assert torch.equal(numbers, other[2]), f"{kind} of {name}"


def test_a_bf16_model_goes_on_to_the_last_bit(worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path) -> None:
    """Its masters have bits that the model's weights do not show."""
    assert_bf16_goes_on_to_the_last_bit(worker_pool, recipe, tmp_path)


def train_save_and_speak(job: Job, folder: Path) -> tuple[Tensor, list[str]]:
    """Logits and answers of a model under ZeRO-3 whose adapter was saved."""
    engine = build_engine(job)
    for step in range(job.recipe.train.max_steps):
        engine.train_step(batches_of(job, step))
    engine.save_adapter(folder)
    answers = engine.generate(QUESTIONS, max_new_tokens=12)
    engine.model.eval()
    with torch.no_grad():
        return engine.model(global_batch(0)[0]).logits.float(), answers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_from_three_ranks_says_the_same_without_deepspeed(
    worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path, dtype: Any
) -> None:
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))
    folder = tmp_path / "adapter"
    ranks = worker_pool(3).run(train_save_and_speak, Job(recipe), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == shapes_in(recipe)
    assert {value.dtype for value in tensors.values()} == {recipe.model.torch_dtype}
    assert all(value.numel() and value.any() for value in tensors.values())

    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=recipe.model.torch_dtype)
    with torch.no_grad():
        of_base = base(global_batch(0)[0]).logits.float()
        model = load_adapter(base, folder)
        logits = model(global_batch(0)[0]).logits.float()
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert (logits - of_base).norm() > 0.05 * of_base.norm(), "it has learned something"
    for of_rank, _ in ranks:
        assert (of_rank - logits).norm() <= tolerance * logits.norm()

    tokenizer = AutoTokenizer.from_pretrained(folder)  # the folder brings the tokenizer along
    answers = [answer_alone(model, tokenizer, question.messages) for question in QUESTIONS]
    for _, of_rank in ranks:
        assert of_rank == ranks[0][1], "all ranks say the same"
        assert dtype == "bf16" or of_rank == answers, "and the same without padding and without DeepSpeed"


def answer_alone(model: Any, tokenizer: Any, question: list[dict[str, str]]) -> str:
    """A greedy answer to one question, token by token and without a cache."""
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    while len(answer) < 12 and (not answer or answer[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def ask_with_another_end_of_turn(job: Job) -> list[int]:
    """Where generation stops for a tokenizer whose texts end with <pad> and whose answers end with <|im_end|>."""
    engine, stops = build_engine(job), []

    def generate(**options: Any) -> Tensor:
        stops.extend(engine.model.generation_config.eos_token_id)
        return options["input_ids"]

    engine.tokenizer.eos_token = "<pad>"
    engine.model.generation_config.eos_token_id = 9
    engine.model.generate = generate
    engine.generate(QUESTIONS, max_new_tokens=1)
    return stops


def test_answers_end_with_the_token_of_the_template_where_the_model_has_another(
    worker_pool: PoolFactory, recipe: Recipe
) -> None:
    assert worker_pool(1).run(ask_with_another_end_of_turn, Job(recipe)) == [[0, 3, 9]]


def signs_while_loading(path: str) -> tuple[int, str]:
    """Signs of life of a rank while it loads a model in ZeRO-3 partitions, and what it has seen at last."""
    from dsmoelora.config import ModelConfig
    from dsmoelora.model import load_model, watched_loading
    from dsmoelora.signs_of_life import waits

    zero_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    beats: list[int] = []
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waits, "LOOK_EVERY_S", 0.01)
        patch.setattr(waits, "FIRST_WORD_S", 0.05)
        patch.setattr(waits.logger, "warning", lambda text, what, _: said.append(what))
        with watched_loading("it", lambda: beats.append(1), speaks=True):
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not beats:  # a first look at nothing, before there is anything
                time.sleep(0.01)
            load_model(ModelConfig(path=path, dtype="fp32"), zero_3)
            while time.monotonic() < deadline and not (
                said and re.search(r"\(([1-9]\d*) of \1 ", said[-1]) and len(beats) > 1
            ):
                time.sleep(0.01)
    return len(beats), said[-1]


def test_a_rank_that_reads_nothing_itself_counts_what_comes(worker_pool: PoolFactory, recipe: Recipe) -> None:
    for num_beats, seen in worker_pool(2).run(signs_while_loading, recipe.model.path):
        assert num_beats > 1
        assert re.fullmatch(r"the weights of it \(([1-9]\d*) of \1 tensors are here\)", seen)
