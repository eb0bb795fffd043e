"""Conversations to tokens, with a mask of what is learned: the assistant's answers, each with its end-of-turn token.

The chat template of the tokenizer renders the text. Most templates do not say which part is the assistant's, so the
beginning of an answer is found by rendering the conversation up to it with the generation prompt, and characters are
mapped to tokens with the offsets of the fast tokenizer. Whoever marks the answers, each goes on to the first special
token after its words, at which generation stops too.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
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
    """Token ids of one conversation, and for each whether the model learns to write it (both of the same length).

    Args:
        input_ids, supervised: of each token
        ends: indices of the tokens that end the answers
    """

    input_ids: list[int]
    supervised: list[bool]
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Rendered:
    """A conversation as its template writes it.

    Args:
        conversation: what was rendered
        text: with special tokens
        ids: its tokens
        offsets: begin and end of each token in the text
        specials: indices of the special tokens
    """

    conversation: Conversation
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    specials: list[int]


@dataclass(frozen=True)
class _Turn:
    """Character positions of one answer in the rendered text.

    Args:
        start: where what is learned begins
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
    has_blocks = GENERATION_BLOCK.search(chat_template_of(tokenizer))
    texts = [_render(tokenizer, conversation.messages) for conversation in conversations]
    # The template writes the beginning-of-sequence token itself where the model wants one.
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    chats = []
    for conversation, text, ids, offsets in zip(
        conversations, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        specials = [i for i, token in enumerate(ids) if token in special]
        rendered = _Rendered(conversation, text, ids, offsets, specials)
        supervised = _in_blocks(tokenizer, rendered) if has_blocks else [False] * len(ids)
        turns = _turns_of_blocks(tokenizer, rendered, supervised) if has_blocks else _turns(tokenizer, rendered)
        ends = []
        for turn in turns:
            first = bisect_left(offsets, turn.start, key=lambda offset: offset[0])
            ends.append(_end_of_turn(rendered, turn))
            supervised[first : ends[-1] + 1] = [True] * (ends[-1] + 1 - first)
        chats.append(TokenisedChat(ids, supervised, tuple(ends)))
    return chats


def stop_ids(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int]:
    """Tokens at which a generated answer ends: the model's own, and those that training teaches answers to end with.

    They differ where a base model, which ends its texts, is tuned on chats, which have a token for the end of a turn.

    Args:
        tokenizer: of the adapter
        own: `eos_token_id` of the model's generation configuration
    """
    found = {own} if own is None or isinstance(own, int) else set(own)
    found.add(tokenizer.eos_token_id)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(RowProblem, ModelError):  # adapters that have learned plain text alone
        (chat,) = tokenise_chats(tokenizer, [Conversation(probe, "", 0)])
        found |= {chat.input_ids[end] for end in chat.ends}
    return sorted(token for token in found if token is not None)


def _refusal(error: TemplateError) -> RowProblem:
    reason = str(error).rstrip(".")
    return RowProblem(f"the model's chat template refuses it: {reason}. Templates may want user and assistant in turn.")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise _refusal(error) from None


def _turns(tokenizer: PreTrainedTokenizerBase, rendered: _Rendered) -> list[_Turn]:
    """The answers, each of which begins where its generation prompt ends."""
    turns = []
    messages, text = rendered.conversation.messages, rendered.text
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
                f"{rendered.conversation.origin}: the chat template renders the conversation up to messages[{i}] with "
                f"other text than inside the whole conversation, so that its answers cannot be found. {remedy}"
            )
        # Nothing of the next message may be taken for the end of this turn. A template may write an earlier answer
        # in another way than the last one (leave out its thoughts, say): then only its beginning is known.
        start, bound = len(prefix), _end_of_message(tokenizer, rendered, i)
        content = message["content"].strip()  # templates may trim
        content_end = _content_end(rendered, content, start, bound)
        if content_end is None and content in text[start:]:
            bound = len(text)
        turns.append(_Turn(start, content_end or start, bound))
    return turns


def _end_of_message(tokenizer: PreTrainedTokenizerBase, rendered: _Rendered, i: int) -> int:
    """Up to where the text is the same if nothing comes after message i."""
    text, so_far = rendered.text, _render(tokenizer, rendered.conversation.messages[: i + 1])
    if text.startswith(so_far):
        return len(so_far)
    pairs = enumerate(zip(text, so_far, strict=False))
    return next((k for k, (a, b) in pairs if a != b), len(text))


def _content_end(rendered: _Rendered, content: str, start: int, bound: int) -> int | None:
    """Where an answer's words end between two places of the text; None where they are not.

    They are the last ones, for a template may write words of its own before an answer, thoughts perhaps, which hold a
    short answer too. But they are no part of a special token's name, and a special token follows.
    """
    spans = [span for i in rendered.specials if start <= (span := rendered.offsets[i])[0] and span[1] <= bound]
    ends = [
        end
        for end in _occurrences(rendered.text, content, start, bound)
        if not any(begin < cut < stop for begin, stop in spans for cut in (end - len(content), end))
    ]
    return next((end for end in ends if spans and end <= spans[-1][0]), ends[0] if ends else None)


def _occurrences(text: str, words: str, start: int, end: int) -> Iterator[int]:
    """Where `words` end, from the last time that they come to the first."""
    while (found := text.rfind(words, start, end)) >= 0:
        yield found + len(words)
        end = found + len(words) - 1


def _end_of_turn(rendered: _Rendered, turn: _Turn) -> int:
    """Index of the first special token after the answer's words."""
    for index in rendered.specials:
        begin, end = rendered.offsets[index]
        if begin >= turn.content_end and end <= turn.bound:
            return index
    raise ModelError(
        f"{rendered.conversation.origin}: the chat template writes no special token after the assistant's answer, so "
        "that the model could not learn to end its turn. Write {{ eos_token }} after the answer in the template."
    )


def _in_blocks(tokenizer: PreTrainedTokenizerBase, rendered: _Rendered) -> list[bool]:
    """Which tokens are in the template's {% generation %} blocks."""
    try:
        encoded: Any = tokenizer.apply_chat_template(
            rendered.conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise _refusal(error) from None
    if not any(encoded["assistant_masks"]):
        raise ModelError(
            f"{rendered.conversation.origin}: the {{% generation %}} block of the chat template marks no token as the "
            "assistant's. Put the block around the assistant's words."
        )
    return [bool(flag) for flag in encoded["assistant_masks"]]


def _turns_of_blocks(tokenizer: PreTrainedTokenizerBase, rendered: _Rendered, marked: list[bool]) -> list[_Turn]:
    """The answers as the blocks mark them. Some templates close the block before the end-of-turn token."""
    turns, first = [], 0
    for is_marked, run in groupby(marked):
        last = first + len(list(run)) - 1
        if is_marked:
            turns.append(_turn_of_block(tokenizer, rendered, first, last))
        first = last + 1
    return turns


def _turn_of_block(tokenizer: PreTrainedTokenizerBase, rendered: _Rendered, first: int, last: int) -> _Turn:
    text, offsets, specials = rendered.text, rendered.offsets, set(rendered.specials)
    words = [i for i in range(first, last + 1) if i not in specials and text[slice(*offsets[i])].strip()]
    word = words[-1] if words else first - 1
    start, content_end = offsets[first][0], offsets[word][1] if words else offsets[first][0]
    if not specials.isdisjoint(range(word + 1, last + 1)):
        return _Turn(start, content_end, offsets[last][1])
    ends = [_end_of_message(tokenizer, rendered, i) for i in range(len(rendered.conversation.messages))]
    return _Turn(start, content_end, min((end for end in ends if end >= content_end), default=len(text)))
