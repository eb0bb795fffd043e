"""Text rows that bring special tokens of their own, with tokenizers that write them too, or do not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.plain_text import text_ids
from tests.helpers import tiny_tokenizer

PAIRS = [("<bos>", "<|im_end|>"), ("<|im_end|>", "<|im_end|>")]


def tokenizer_of(folder: Path, begin: str, end: str, adds: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(folder)
    tokenizer.bos_token, tokenizer.eos_token = begin, end
    pieces = [(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    single = f"{begin} $A" * ("b" in adds) or "$A"
    single += f" {end}" * ("e" in adds)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=pieces)
    return tokenizer


@pytest.mark.parametrize(("begin", "end"), PAIRS)
@pytest.mark.parametrize("adds", ["", "b", "e", "be"])
@pytest.mark.parametrize("before", ["", "B", " B", "\nB ", "BB", "B\nB"])
@pytest.mark.parametrize("after", ["", "E", " E", "E\n", "E \n", "EE", "E\nE\n"])
def test_each_comes_once(tmp_path: Path, begin: str, end: str, adds: str, before: str, after: str) -> None:
    tokenizer = tokenizer_of(tmp_path, begin, end, adds)
    text = f"{before}Hi{after}".replace("B", begin).replace("E", end)
    ids = text_ids(tokenizer, text)
    lead = " " * before.endswith(" ")  # what stands between them is the text
    tail = " " * after.startswith(" ")
    has_begin = "b" in adds or "B" in before
    assert tokenizer.decode(ids) == begin * has_begin + f"{lead}Hi{tail}" + end


@cache
def shared() -> PreTrainedTokenizerBase:
    return tokenizer_of(Path(mkdtemp()), "<bos>", "<|im_end|>", "b")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<bos>", "<|im_end|>", " ", "\n", "a", "é", "🦙"]), min_size=1))
def test_text_inside_stays_as_it_is(parts: list[str]) -> None:
    tokenizer = shared()
    text = "".join(["x", *parts, "y"])
    assert tokenizer.decode(text_ids(tokenizer, text)) == f"<bos>{text}<|im_end|>"


def test_tokenizers_without_a_beginning(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.bos_token = None
    assert tokenizer.decode(text_ids(tokenizer, "Hi<|im_end|> \n")) == "Hi<|im_end|>"
