"""Tokens and positions that a model has no embedding for: said by every program in place of an index out of range."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CTRLConfig,
    GPTJConfig,
    OPTConfig,
    PretrainedConfig,
    XGLMConfig,
)

from dsmoelora import AdapterConfig
from dsmoelora.callbacks import HeldOutScore
from dsmoelora.config import DataConfig, DataSource, ModelConfig, Recipe
from dsmoelora.data.limits import Limits
from dsmoelora.errors import ConfigError, DataError, ModelError, UserError
from dsmoelora.model import limits_at, limits_of
from launch import evaluate, export, generate
from tests.architectures import ARCHITECTURES, save_model
from tests.given_adapters import our_adapter
from tests.helpers import tiny_tokenizer

TINY = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
NEW = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("described", "num_positions"),
    [
        *((architecture.config(), 64 if name == "gpt2" else None) for name, architecture in ARCHITECTURES.items()),
        (OPTConfig(**NEW, max_position_embeddings=40), 40),  # its table begins with two rows more
        (GPTJConfig(**TINY, n_positions=40, rotary_dim=4), 40),  # sines that are looked up
        (CTRLConfig(**TINY, n_positions=40), 40),
        (XGLMConfig(vocab_size=50, d_model=16, num_layers=1, attention_heads=2, ffn_dim=16), None),  # its table grows
        (BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
@torch.no_grad()
def test_positions_end_where_the_model_looks_them_up(described: PretrainedConfig, num_positions: int | None) -> None:
    model = AutoModelForCausalLM.from_config(described).eval()
    assert limits_of(model) == Limits(described.get_text_config().vocab_size, num_positions)
    length = num_positions or 70
    model(torch.ones(1, length, dtype=torch.int64))
    if num_positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, length + 1, dtype=torch.int64))


def test_a_model_that_cannot_be_built_has_no_limits_that_are_known(tmp_path: Path) -> None:
    assert limits_at(str(tmp_path)) == Limits()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a GPT-2 of 64 positions, whose tokenizer has one token more than it has embeddings."""
    folder = tmp_path_factory.mktemp("gpt2")
    base = save_model("gpt2", folder / "base")
    our_adapter(base, folder / "adapter", AdapterConfig(target_modules=["c_attn"], r=2, num_experts=2, top_k=1))
    tokenizer = tiny_tokenizer(folder / "adapter")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter"


def rows(folder: Path, *questions: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": question, "completion": "y"}) + "\n" for question in questions))
    return str(path)


def run(program: Any, monkeypatch: pytest.MonkeyPatch, adapter: Path, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, "--adapter", str(adapter), *map(str, argv)])
    program.main()


NO_TOKEN = r"holds '<tool>', which is token 260, but the embedding of the model has 260 rows"
NO_POSITION = r"but the model has an embedding for 64 positions\. Shorten it"


@pytest.mark.parametrize(("question", "why"), [("a <tool>", NO_TOKEN), ("x" * 60, NO_POSITION)])
def test_prompts_beyond_the_model(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str, why: str
) -> None:
    with pytest.raises(ModelError, match=f"The prompt cannot be asked: .*{why}"):
        run(generate, monkeypatch, gpt2, "--prompt", question)
    with pytest.raises(ModelError, match=f"The prompt cannot be asked: .*{why}"):  # no fault of --system
        run(generate, monkeypatch, gpt2, "--prompt", question, "--system", "x")
    data = ("--data", rows(tmp_path, question), "--score", "exact", "--out", tmp_path / "out")
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{why}"):
        run(evaluate, monkeypatch, gpt2, *data)


def test_an_answer_ends_before_the_positions_do(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", rows(tmp_path, "Hi"), "--score", "exact")
    with pytest.raises(DataError, match=r"may get 256 more, .* Shorten it, or lower --max-new-tokens"):
        run(evaluate, monkeypatch, gpt2, *data, "--out", tmp_path / "long")
    run(evaluate, monkeypatch, gpt2, *data, "--out", tmp_path / "short", "--max-new-tokens", 8)
    with pytest.raises(ModelError, match=r"may get 128 more, .* Shorten it, or lower --max-new-tokens"):
        run(generate, monkeypatch, gpt2, "--prompt", "Hi")
    run(generate, monkeypatch, gpt2, "--prompt", "Hi", "--max-new-tokens", 8)


@pytest.mark.parametrize("program", [evaluate, export])
def test_texts_beyond_the_model(
    program: Any, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token without an embedding is refused; a text is cut where the positions end."""
    what = ("--format", "average") if program is export else ("--score", "loss")

    def score(question: str, *more: object) -> None:
        run(program, monkeypatch, gpt2, "--data", rows(tmp_path, question), *what, "--out", tmp_path / "out", *more)

    with pytest.raises(DataError, match=NO_TOKEN):
        score("a <tool>")
    with pytest.raises(ConfigError, match=r"data\.max_length is 65, but it must be at most 64, the positions"):
        score("x", "--data.max_length", 65)
    score("x" * 30)
    assert "data.max_length is 64: the model has no more positions." in capsys.readouterr().out


def test_wrong_rows_are_skipped_where_the_user_says_so(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", rows(tmp_path, "a <tool>", "x" * 60, "Hi"), "--data.on_bad_row", "skip", "--out", tmp_path)
    run(evaluate, monkeypatch, gpt2, *data, "--score", "exact", "--max-new-tokens", 8)
    assert "2 rows skipped (row 1: it holds '<tool>'" in capsys.readouterr().out.replace("\n", " ")
    average = ("--format", "average", *data[:-1], tmp_path / "average")
    run(export, monkeypatch, gpt2, *average)
    assert "1 of 3 rows skipped (row 1: it holds '<tool>'" in capsys.readouterr().out


def test_choices_beyond_the_model(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "choices.jsonl"
    for question, why in (("a <tool>", NO_TOKEN), ("x" * 60, NO_POSITION)):
        path.write_text(json.dumps({"question": question, "choices": ["a", "b"], "answer": 0}))
        with pytest.raises(UserError, match=why):
            run(evaluate, monkeypatch, gpt2, "--data", path, "--score", "choice", "--out", tmp_path / "out")


def test_scores_of_a_run_are_answers_that_have_positions(gpt2: Path, tmp_path: Path) -> None:
    data = DataConfig(eval=[DataSource(rows(tmp_path, "Hi"))], max_length=64)
    recipe = Recipe(model=ModelConfig(str(gpt2.parent / "base"), "fp32"), data=data)
    recipe.train.eval_score, recipe.train.sample_max_new_tokens = "exact", 50
    with pytest.raises(DataError, match=rf"row 1: .*{NO_POSITION}, or lower train\.sample_max_new_tokens"):
        HeldOutScore.of(recipe, tiny_tokenizer(tmp_path))
    recipe.train.sample_max_new_tokens = 8
    HeldOutScore.of(recipe, tiny_tokenizer(tmp_path))


def test_the_longest_answer_of_a_server_ends_with_the_positions(gpt2: Path) -> None:
    fastapi = pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from dsmoelora.model import load_trained
    from dsmoelora.serving import prompting_as_in_training, within_limits

    model, _ = load_trained(gpt2, None)
    tokenizer, limits = AutoTokenizer.from_pretrained(gpt2), limits_of(model)
    answer = within_limits(limits, tokenizer, model.generate)
    model.generation_config.update(max_new_tokens=500, eos_token_id=None, do_sample=False)
    ids = torch.full((1, 60), 40)
    assert answer(input_ids=ids, generation_config=model.generation_config).shape == (1, 65)
    for beyond in (torch.full((1, 65), 40), torch.tensor([[260]])):
        with pytest.raises(fastapi.HTTPException, match="The prompt cannot be asked"):
            answer(input_ids=beyond, generation_config=model.generation_config)
    chat = [{"role": "user", "content": "a <tool>"}]
    with pytest.raises(fastapi.HTTPException, match=NO_TOKEN):
        prompting_as_in_training(tokenizer, limits).apply_chat_template(chat)
