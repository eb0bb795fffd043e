"""A small model learns twenty conversations, and gives their first answers back to generate.py."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.chat_styles import STYLES, WITHOUT_SYSTEM, tokenizer_of
from tests.conftest import thorough
from tests.forked import Program
from tests.helpers import tiny_llama
from tests.launched import ROOT, Ranks

RECIPE = """
run: {{name: words, dir: {folder}/runs, seed: 3}}
model: {{path: {folder}/model, dtype: fp32}}
adapter: {{num_experts: 2, top_k: 2, r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear,
           lora_modules: [lm_head]}}
optim: {{lr: 1e-2, warmup_steps: 5}}
data: {{train: [{{path: {folder}/train.jsonl}}], max_length: 128}}
train: {{max_steps: 100, batch_size: 20, micro_batch_size: 20, save_every: 100, num_samples: 0}}
"""
SYSTEM = "Be brief."
OPENED = {"thinking": "<think>\n\n</think>\n\n"}  # what the template writes at the beginning of an answer
GUARD = "system in the last turn"  # which rewrites earlier turns


@pytest.mark.parametrize("style", [style if style == GUARD else thorough(style) for style in STYLES])
def test_first_answers_come_back_word_for_word(style: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(style)
    tiny_llama(tmp_path / "model", vocab_size=len(tokenizer), initializer_range=0.15)
    tokenizer.save_pretrained(tmp_path / "model")
    rng = random.Random(0)
    asked = ["".join(rng.choices("fghijklm", k=4)) for _ in range(20)]
    answers = ["".join(rng.choices("abcdeé ", k=5)).strip() + rng.choice("!?😀") for _ in asked]
    system = [] if style in WITHOUT_SYSTEM else [{"role": "system", "content": SYSTEM}]
    talks = [
        [("user", question), ("assistant", answer), ("user", "and?"), ("assistant", "Yes.")]
        for question, answer in zip(asked, answers, strict=True)
    ]
    rows = [{"messages": system + [{"role": role, "content": words} for role, words in talk]} for talk in talks]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    with Ranks(["--config", str(tmp_path / "recipe.yaml")]) as ranks:
        (done,) = ranks.finish()
    assert done.returncode == 0, done.stderr
    argv = [str(ROOT / "launch" / "generate.py"), "--adapter", str(tmp_path / "runs" / "words" / "adapter")]
    argv += [word for question in asked for word in ("--prompt", question)] + ["--max-new-tokens", "40"]
    argv += ["--system", SYSTEM] if system else []
    said, errors = Program(argv, env=os.environ).communicate(timeout=120)
    expected = "".join(
        f"> {question}\n{OPENED.get(style, '')}{answer}\n" for question, answer in zip(asked, answers, strict=True)
    )
    assert said == expected, errors
