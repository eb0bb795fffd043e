"""Tokenizers as base models bring them: without a chat template, or as a bare sentencepiece file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dsmoelora.config import ModelConfig
from dsmoelora.data.chat import tokenise_chats
from dsmoelora.data.fallback_template import ensure_chat_template, is_fallback
from dsmoelora.data.formats import Conversation
from dsmoelora.errors import ModelError
from dsmoelora.model import load_tokenizer
from tests.helpers import tiny_llama, tiny_tokenizer

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]
TEXTS = ["a dog  ran", "two  spaces", "x   y", "tail  ", "line\n\nline\ttab", "é 日本 😀", "the the  the", "end."]


def learned(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The whole text, and what is learned of it."""
    ((chat,),) = tokenise_chats(tokenizer, [Conversation(TALK, "a", 1)])
    kept = [token for token, flag in zip(chat.input_ids, chat.supervised, strict=True) if flag]
    return str(tokenizer.decode(chat.input_ids)), str(tokenizer.decode(kept))


def test_a_pad_token_without_an_embedding_is_replaced(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tiny_llama(tmp_path))
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).pad_token == "<|im_end|>"


def test_fallback_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=None)
    ensure_chat_template(tokenizer)
    assert learned(tokenizer) == (
        "### System:\nS\n\n### User:\nab\n\n### Assistant:\ncd<|im_end|>\n\n"
        "### User:\ne\n\n### Assistant:\nf<|im_end|>\n\n",
        "cd<|im_end|>f<|im_end|>",
    )
    prompt = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "### System:\nS\n\n### User:\nab\n\n### Assistant:\n"
    tokenizer.save_pretrained(tmp_path / "saved")  # as an adapter's folder does: generation needs the same template
    assert is_fallback(AutoTokenizer.from_pretrained(tmp_path / "saved"))


def test_fallback_begins_as_the_tokenizer_begins(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=None)
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    ensure_chat_template(tokenizer)
    assert learned(tokenizer)[0].startswith("<bos>### System:")
    assert learned(tokenizer)[0].count("<bos>") == 1


def test_a_template_of_its_own_stays(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    before = tokenizer.chat_template
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == before and not is_fallback(tokenizer)


def test_nothing_to_end_an_answer_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token"):
        ensure_chat_template(tokenizer)


def sentencepiece_folder(folder: Path, model_type: str) -> sentencepiece.SentencePieceProcessor:
    """A model's folder with a tiny `tokenizer.model`, whose pieces of spaces have the lowest scores, as Llama's do."""
    words = ["the dog ran to the house", "a cat  sat on the mat", "dogs and cats  ran", "the end. the line", "tail x y"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310 if model_type == "bpe" else 300,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("with_config", [False, True])
def test_sentencepiece_gives_its_own_pieces(tmp_path: Path, with_config: bool) -> None:
    pieces = sentencepiece_folder(tmp_path, "bpe")
    if with_config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == [pieces.encode(t) for t in TEXTS]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (pieces.bos_id(), pieces.eos_id())
    assert tokenizer.pad_token_id == pieces.eos_id()  # there is no padding piece
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_sentencepiece_with_the_fallback_template(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, "bpe")
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    text, answers = learned(tokenizer)
    assert text.startswith("<s>") and text.count("<s>") == 1
    assert answers == "cd</s>f</s>"


def test_sentencepiece_files_that_cannot_be_used(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, "unigram")
    with pytest.raises(ModelError, match=r"tokenizer\.model is a sentencepiece model, but not of type BPE"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as of tiktoken
    with pytest.raises(ModelError, match=r"tokenizer\.model is no sentencepiece model"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
