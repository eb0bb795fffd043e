"""Conversations to tokens, with a mask of what is learned: the assistant's answers, each with its end-of-turn token.

The chat template of the tokenizer renders the text. Most templates do not say which part is the assistant's, so the
beginning of an answer is found by rendering the conversation up to it with the generation prompt, and characters are
mapped to tokens with the offsets of the fast tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.formats import Conversation
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.rows import Message
from dsmoelora.errors import ModelError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenisedChat:
    """Token ids of one conversation, and for each whether the model learns to write it (both of the same length)."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class _Turn:
    """Character positions of one answer in the rendered text.

    Args:
        start: where the answer begins, right after the generation prompt
        content_end: the end-of-turn token does not begin before this
        bound: the end-of-turn token ends here at the latest
    """

    start: int
    content_end: int
    bound: int


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that conversations are rendered with.

    Raises:
        ModelError: there is none, or the tokenizer is not a fast one
    """
    where = f"The tokenizer of {tokenizer.name_or_path or 'the model'}"
    if not tokenizer.is_fast:
        raise ModelError(f"{where} is a slow one, but a fast one (tokenizer.json) is needed. Convert and save it.")
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        remedy = "Take the chat version of the model, or put a chat_template.jinja into its folder."
        raise ModelError(f"{where} has no chat template, but conversations are rendered with one. {remedy}") from None


def tokenise_chats(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> list[TokenisedChat]:
    """Tokenise whole conversations; nothing is cut.

    Raises:
        RowProblem: the template refuses a conversation
        ModelError: there is no template, or the answers cannot be found in what it renders
    """
    if GENERATION_BLOCK.search(chat_template_of(tokenizer)):
        return [_tokenise_with_generation_block(tokenizer, conversation) for conversation in conversations]
    texts = [_render(tokenizer, conversation.messages) for conversation in conversations]
    # The template writes the beginning-of-sequence token itself where the model wants one.
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    chats = []
    for conversation, text, ids, offsets in zip(
        conversations, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        supervised = [False] * len(ids)
        specials = [i for i, token in enumerate(ids) if token in special]
        for turn in _turns(tokenizer, conversation, text):
            first = bisect_left(offsets, turn.start, key=lambda offset: offset[0])
            last = _end_of_turn(conversation, turn, offsets, specials)
            supervised[first : last + 1] = [True] * (last + 1 - first)
        chats.append(TokenisedChat(ids, supervised))
    return chats


def _refusal(error: TemplateError) -> RowProblem:
    reason = str(error).rstrip(".")
    return RowProblem(f"the model's chat template refuses it: {reason}. Templates may want user and assistant in turn.")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise _refusal(error) from None


def _turns(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str) -> list[_Turn]:
    turns = []
    messages = conversation.messages
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prefix = _render(tokenizer, messages[:i], prompt=True)
        if not text.startswith(prefix):
            remedy = (
                "Mark the assistant's words with {% generation %} ... {% endgeneration %} in the template, "
                "or keep one question and one answer a row."
            )
            raise ModelError(
                f"{conversation.origin}: the chat template renders the conversation up to messages[{i}] with other text"
                f" than inside the whole conversation, so that its answers cannot be found. {remedy}"
            )
        start = len(prefix)
        content = message["content"].strip()  # templates may trim
        found = text.find(content, start)
        content_end = found + len(content) if found >= 0 else start
        # Nothing of the next message may be taken for the end of this turn. A template may write an earlier answer
        # in another way than the last one (leave out its thoughts, say): then only the content's end is known.
        so_far = _render(tokenizer, messages[: i + 1])
        bound = _common_length(text, so_far)
        turns.append(_Turn(start, content_end, bound) if bound >= content_end else _Turn(start, start, len(text)))
    return turns


def _common_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _end_of_turn(conversation: Conversation, turn: _Turn, offsets: list[tuple[int, int]], specials: list[int]) -> int:
    """Index of the first special token after the answer's words."""
    for index in specials:
        if offsets[index][0] >= turn.content_end and offsets[index][1] <= turn.bound:
            return index
    raise ModelError(
        f"{conversation.origin}: the chat template writes no special token after the assistant's answer, so that the "
        "model could not learn to end its turn. Write {{ eos_token }} after the answer in the template."
    )


def _tokenise_with_generation_block(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> TokenisedChat:
    try:
        encoded: Any = tokenizer.apply_chat_template(
            conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise _refusal(error) from None
    ids = list(encoded["input_ids"])
    supervised = [bool(flag) for flag in encoded["assistant_masks"]]
    # Some templates close the block before the end-of-sequence token, and the model would never learn to stop.
    for i in range(1, len(ids)):
        if ids[i] == tokenizer.eos_token_id and supervised[i - 1]:
            supervised[i] = True
    if not any(supervised):
        raise ModelError(
            f"{conversation.origin}: the {{% generation %}} block of the chat template marks no token as the "
            "assistant's. Put the block around the assistant's words."
        )
    return TokenisedChat(ids, supervised)
