"""Tokens for which a model's embedding has no row: no error of any library names them, only an index out of range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsmoelora.data.chat import prompt_ids
from dsmoelora.data.formats import Conversation
from dsmoelora.data.problems import RowProblem
from dsmoelora.errors import ModelError


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], num_embeddings: int | None) -> None:
    """All of them have a row in an embedding of that many; None for one of unknown size.

    Raises:
        RowProblem: one has none
    """
    if num_embeddings is not None and ids and max(ids) >= num_embeddings:
        raise beyond(str(tokenizer.convert_ids_to_tokens(max(ids))), max(ids), num_embeddings)


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> dict[str, int]:
    """Added tokens that the model has no embedding for, with their ids. Only a text that holds them is in trouble.

    Raises:
        ModelError: there is none for an ordinary token, for the one that ends texts, or for what the template writes
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    found = {token: i for token, i in vocabulary.items() if i >= num_embeddings}
    if not found:
        return {}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    written = _written_by_template(tokenizer)
    for token, i in sorted(found.items(), key=lambda pair: pair[1]):
        if token not in added or i in (tokenizer.bos_token_id, tokenizer.eos_token_id) or i in written:
            raise ModelError(
                f"The tokenizer of {tokenizer.name_or_path or 'the model'} has {token!r} as number {i}, but the "
                f"embedding of the model has {num_embeddings} rows, 0 to {num_embeddings - 1}. Give a tokenizer and a "
                "model that belong together, or enlarge the embedding (resize_token_embeddings) and save the model."
            )
    return found


def check_conversation(conversation: Conversation, tokens: dict[str, int], num_embeddings: int) -> None:
    """None of these tokens stands in a row, which need not be tokenised to know.

    Raises:
        RowProblem: one does
    """
    texts = [conversation.text, *_strings(conversation.messages), *_strings(conversation.tools)]
    for token, i in tokens.items():
        if any(token in text for text in texts):
            raise beyond(token, i, num_embeddings)


def beyond(token: str, number: int, num_embeddings: int) -> RowProblem:
    """A row with a token that the model has no embedding for."""
    return RowProblem(
        f"it holds {token!r}, which is token {number}, but the embedding of the model has {num_embeddings} rows, 0 to "
        f"{num_embeddings - 1}. Enlarge it (resize_token_embeddings) and save the model, or write the word otherwise."
    )


def _written_by_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    try:
        return set(prompt_ids(tokenizer, [{"role": "user", "content": "a"}]))
    except RowProblem:  # of the template's own rules, which every row will meet
        return set()


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in _strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in _strings(each)]
    return [value] if isinstance(value, str) else []
