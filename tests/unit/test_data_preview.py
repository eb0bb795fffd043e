from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data import InstructionDataset, load_instructions, preview
from tests.helpers import tiny_tokenizer

ROWS = [
    {"instruction": "[red]Hi", "output": "[Yes]"},
    {"instruction": "B", "output": "no"},
    {"instruction": "C" * 60, "output": "y"},
    {"instruction": "D", "output": "y" * 60},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> InstructionDataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return load_instructions([DataSource(str(tmp_path / "a.jsonl"))], "data.train", tokenizer, 40)


def test_what_is_learned_stands_between_marks(dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    text = preview(dataset, tokenizer, 2)
    # 21 tokens frame every question and answer; the answer and its end are learned
    assert "a.jsonl, row 1: 33 tokens, 6 of them learned\n" in text
    assert "<|im_start|>user\n[red]Hi<|im_end|>\n<|im_start|>assistant\n⟦[Yes]<|im_end|>⟧\n" in text
    assert "a.jsonl, row 2: 24 tokens, 3 of them learned\n" in text
    assert "<|im_start|>assistant\n⟦no<|im_end|>⟧\n" in text
    assert "row 4" not in text
    assert "a.jsonl: 1 of 4 cut at data.max_length; 1 of 4 left out" in text


def test_more_than_there_is(dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    text = preview(dataset, tokenizer, 100)
    assert text.startswith("3 of 3 samples")
    assert "row 4: 40 tokens" in text


def test_markup_shows_the_same_text_in_colour(dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    text = Text.from_markup(preview(dataset, tokenizer, 1, markup=True))
    assert "[red]Hi<|im_end|>" in text.plain
    (span,) = text.spans
    assert text.plain[span.start : span.end] == "[Yes]<|im_end|>"
    assert span.style == "bold green"


def test_a_row_for_each_answer_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<bos>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate("abcd")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    dataset = load_instructions([DataSource(str(tmp_path / "a.jsonl"))], "data.train", tokenizer, 99)
    text = preview(dataset, tokenizer, 9)
    assert "assistant: ⟦<bos>b<|im_end|>⟧\n" in text
    assert "assistant: b<|im_end|>user: c<|im_end|>assistant: ⟦<bos>d<|im_end|>⟧\n" in text
    assert "1 of 1 became 2 rows, one for each answer, because the chat template writes earlier turns otherwise" in text
    assert [len(dataset.messages(i)) for i in range(2)] == [2, 4]
