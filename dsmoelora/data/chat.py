"""Conversations to tokens, with a mask of what is learned: the assistant's answers, each with its end-of-turn token.

One definition: the ids before a learned answer are those that generation sends for the same history (`prompt_ids`), and
the learned ids are those that the model has to produce then, up to its end-of-turn token. Where every such prompt is a
prefix of the rendered whole, all answers share one row; elsewhere each answer gets a row of its own.

Where an answer ends is told by rendering it with a mark instead of its words: what stands after the mark is what the
template writes after any answer. So words that look like an end of turn do not pass for one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.dropped import check_nothing_dropped
from dsmoelora.data.formats import Conversation
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.turns import Message
from dsmoelora.errors import ModelError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REWRITTEN = "the chat template writes earlier turns otherwise once others follow"
MERGED = "tokens of an answer merge with those around it"
_PROVEN = 3  # answers of a long conversation that are rendered one by one: the first, the middle and the last


@dataclass(frozen=True)
class TokenisedChat:
    """Token ids of one row, and for each whether the model learns to write it (both of the same length).

    Args:
        input_ids, supervised: of each token
        ends: indices of the tokens that end the answers
        num_messages: of the conversation that the row holds
        split: why the conversation has a row for each answer; empty where all share one
    """

    input_ids: list[int]
    supervised: list[bool]
    ends: tuple[int, ...] = ()
    num_messages: int = 0
    split: str = ""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        messages: up to the answer
        tools: that it may call
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Answer:
    """One learned answer and all that comes before it.

    Args:
        message: its index
        text: of the conversation up to its end-of-turn token
        prompt: ids that generation sends for what comes before it
        ids: the model has to produce then, end of turn included
    """

    message: int
    text: str
    prompt: list[int]
    ids: list[int]


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


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """What a model reads before it answers: in training, in the samples of a run, and in the programs of `launch/`.

    Args:
        tokenizer: with a chat template
        messages: up to the answer
        tools: that it may call
        options: more for the template, where whoever asks wants another prompt than training's

    Raises:
        RowProblem: the template refuses the conversation
    """
    return _ids(tokenizer, _render(tokenizer, messages, tools, prompt=True, **options))


def tokenise_chats(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> list[list[TokenisedChat]]:
    """Tokenise whole conversations, each into one row or a row for each answer; nothing is cut.

    Raises:
        RowProblem: the template refuses a conversation, or what it makes of an answer cannot be told with certainty
        ModelError: there is no template, or it ends no turn
    """
    has_blocks = bool(GENERATION_BLOCK.search(chat_template_of(tokenizer)))
    return [_Renderer(tokenizer, conversation, has_blocks).rows() for conversation in conversations]


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
        ((chat,),) = tokenise_chats(tokenizer, [Conversation(probe, "", 0)])
        found |= {chat.input_ids[end] for end in chat.ends}
    return sorted(token for token in found if token is not None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the beginning-of-sequence token itself where the model wants one.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None,
    *,
    prompt: bool = False,
    **options: Any,
) -> str:
    options |= {"tokenize": False, "add_generation_prompt": prompt}
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, **options))
    except (TemplateError, TypeError) as error:  # a type error: the template meets something it cannot join
        raise _refusal(error) from None


def _refusal(error: Exception) -> RowProblem:
    reason = str(error).rstrip(".")
    return RowProblem(f"the model's chat template refuses it: {reason}. Templates may want user and assistant in turn.")


def _squeezed(text: str) -> str:
    return "".join(text.split())


class _Renderer:
    """One conversation, rendered and tokenised.

    Args:
        tokenizer: with a template
        conversation: with messages
        has_blocks: the template marks the assistant's words with {% generation %}
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, has_blocks: bool) -> None:
        self._tokenizer, self._conversation, self._has_blocks = tokenizer, conversation, has_blocks
        self._messages, self._origin = conversation.messages, conversation.origin
        self._tools: list[Any] | None = conversation.tools
        every = [i for i, message in enumerate(self._messages) if message["role"] == "assistant"]
        self._learned = every if conversation.learned is None else sorted(conversation.learned)
        added = tokenizer.added_tokens_decoder.items()
        # An end-of-sequence token ends a turn even where the tokenizer does not call it special.
        self._special = {i for i, token in added if token.special} | {tokenizer.eos_token_id}
        word, contents = "Answer", str(self._messages) + str(self._tools)
        while word in contents:
            word += "X"
        self._mark = word + "Here"

    def rows(self) -> list[TokenisedChat]:
        """One row, or one for each learned answer."""
        check_nothing_dropped(self._conversation, partial(_render, self._tokenizer))
        text = _render(self._tokenizer, self._messages, self._tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        spans = self._spans_of_many(text, ids, offsets) if len(self._learned) > _PROVEN else None
        if spans is None:
            answers = [self._answer(i) for i in self._learned]
            why = next((why for answer in answers if (why := _why_apart(answer, text, ids))), "")
            if why:
                return [self._row_of(answer, why if len(answers) > 1 else "") for answer in answers]
            spans = [(len(answer.prompt), len(answer.prompt) + len(answer.ids)) for answer in answers]
        marked = self._marked(len(self._messages), ids)
        supervised = [False] * len(ids)
        for first, end in spans:
            supervised[first:end] = self._narrowed(marked[first:end])
        return [TokenisedChat(ids, supervised, tuple(end - 1 for _, end in spans), len(self._messages))]

    def _row_of(self, answer: _Answer, why: str) -> TokenisedChat:
        ids = answer.prompt + answer.ids
        marked = self._marked(answer.message + 1, ids)
        supervised = [False] * len(answer.prompt) + self._narrowed(marked[len(answer.prompt) :])
        return TokenisedChat(ids, supervised, (len(ids) - 1,), answer.message + 1, why)

    def _marked(self, num_messages: int, ids: list[int]) -> list[bool]:
        """Which of `ids` are in {% generation %} blocks; all, where there are none or they mark other ids."""
        if not self._has_blocks:
            return [True] * len(ids)
        encoded: Any = self._tokenizer.apply_chat_template(
            self._messages[:num_messages], tools=self._tools, return_dict=True, return_assistant_tokens_mask=True
        )
        same = encoded["input_ids"][: len(ids)] == ids
        return [bool(flag) for flag in encoded["assistant_masks"][: len(ids)]] if same else [True] * len(ids)

    def _narrowed(self, marked: list[bool]) -> list[bool]:
        """What is learned of an answer: the part in a block where there are blocks, and always its end."""
        if not any(marked):
            raise ModelError(
                f"{self._origin}: the {{% generation %}} block of the chat template marks no token as the assistant's. "
                "Put the block around the assistant's words."
            )
        return [*marked[:-1], True]

    def _answer(self, i: int) -> _Answer:
        """The exact way: three renderings of the conversation up to message i."""
        history, message = self._messages[:i], self._messages[i]
        prompt = _render(self._tokenizer, history, self._tools, prompt=True)
        so_far = _render(self._tokenizer, self._messages[: i + 1], self._tools)
        marked = _render(self._tokenizer, [*history, {"role": "assistant", "content": self._mark}], self._tools)
        _, found, after = marked.rpartition(self._mark)
        if not found:
            raise RowProblem(f"the chat template leaves out the words of messages[{i}].")
        size = self._end_of_turn(after)
        if not so_far.startswith(prompt):
            raise self._other_than_asked(i, prompt)
        words = so_far[len(prompt) : len(so_far) - len(after)]
        content = message.get("content")
        if not so_far.endswith(after) or len(prompt) + len(words) + len(after) != len(so_far):
            raise RowProblem(f"the chat template ends messages[{i}] otherwise than other answers: {so_far[-40:]!r}.")
        if isinstance(content, str) and _squeezed(content) not in _squeezed(words):
            raise RowProblem(f"the chat template rewrites or leaves out words of messages[{i}]: {words[:60]!r}.")
        end = len(prompt) + len(words) + size
        return self._tokenised(i, prompt, so_far[len(prompt) : end])

    def _other_than_asked(self, i: int, prompt: str) -> RowProblem | ModelError:
        """An answer that is not written after its generation prompt: by this template ever, or in this row."""
        trouble = (
            f"the chat template writes messages[{i}] in another way than after its generation prompt, so that it would "
            f"be learned as generation never asks for it: {prompt[-40:]!r} comes before an answer."
        )
        plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with suppress(RowProblem):
            prompt = _render(self._tokenizer, plain[:1], None, prompt=True)
            if not _render(self._tokenizer, plain, None).startswith(prompt):
                remedy = "Let add_generation_prompt add what stands before the answers, and nothing else."
                return ModelError(f"{self._origin}: {trouble} {remedy}")
        return RowProblem(trouble)

    def _tokenised(self, i: int, prompt: str, answer: str) -> _Answer:
        before, both = _ids(self._tokenizer, prompt), _ids(self._tokenizer, prompt + answer)
        if both[: len(before)] == before:
            ids = both[len(before) :]
        else:
            ids = _ids(self._tokenizer, answer)
            if self._tokenizer.decode(before + ids) != self._tokenizer.decode(both):
                raise RowProblem(f"the first token of messages[{i}] cannot be told apart from the prompt before it.")
        if not ids or ids[-1] not in self._special:
            raise RowProblem(f"the end of messages[{i}] merges with its words: {answer[-40:]!r}.")
        return _Answer(i, prompt + answer, before, ids)

    def _end_of_turn(self, after: str) -> int:
        """Length of what the template writes after an answer, up to and including the first special token."""
        encoded = self._tokenizer(after, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        end = next((end for token, (_, end) in pairs if token in self._special), None)
        if end is None:
            raise ModelError(
                f"{self._origin}: the chat template writes no special token after the assistant's answer, so that the "
                "model could not learn to end its turn. Write {{ eos_token }} after the answer in the template."
            )
        return int(end)

    def _spans_of_many(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """Token spans of all answers of a long conversation, in time linear in its turns; None: take the exact way.

        Proven for the first, the middle and the last answer: all that `_answer` proves, and that they share the row.
        Proven for the others: their words stand between the same text as the words of these three, and their tokens
        and their prompt's, from the last special token before on, are the same without what follows.
        Taken from the three for the others: that their prompt's history is rendered as it is in the whole.
        """
        places = self._places(text)
        if places is None:
            return None
        chosen = [self._learned[k] for k in (0, len(self._learned) // 2, -1)]
        proven = [self._answer(i) for i in chosen]
        if any(_why_apart(answer, text, ids) for answer in proven):
            return None
        prompt = _render(self._tokenizer, self._messages[: chosen[0]], self._tools, prompt=True)
        begin, end = places[chosen[0]]
        if chosen[0] == 0 or len(prompt) > begin:
            return None
        header = text[places[chosen[0] - 1][1] : begin]
        lead, ending = begin - len(prompt), proven[0].text[end:]
        starts = [begin for begin, _ in offsets]
        specials = [k for k, token in enumerate(ids) if token in self._special]
        special_ends = [offsets[k][1] for k in specials]
        spans = []
        for i in self._learned:
            begin, end = places[i]
            if not text.endswith(header, 0, begin) or not text.startswith(ending, end):
                return None
            span = self._span(text, ids, starts, (begin - lead, end + len(ending)), specials, special_ends)
            if span is None:
                return None
            spans.append(span)
        exact = {(len(answer.prompt), len(answer.prompt) + len(answer.ids)) for answer in proven}
        return spans if exact <= set(spans) else None

    def _span(
        self,
        text: str,
        ids: list[int],
        starts: list[int],
        chars: tuple[int, int],
        specials: list[int],
        special_ends: list[int],
    ) -> tuple[int, int] | None:
        """Tokens of an answer at `chars`; None where prompt or answer would be other tokens without what follows.

        Special tokens part a text into pieces that are tokenised apart, so the pieces of the answer will do.
        """
        before = bisect_right(special_ends, chars[0]) - 1
        token = specials[before] if before >= 0 else 0
        prompt = _ids(self._tokenizer, text[starts[token] : chars[0]])
        both = _ids(self._tokenizer, text[starts[token] : chars[1]])
        begin, end = token + len(prompt), token + len(both)
        return (begin, end) if both[: len(prompt)] == prompt and ids[token:end] == both else None

    def _places(self, text: str) -> list[tuple[int, int]] | None:
        """Where the words of each message stand in `text`; None where they do not stand there one after the other."""
        if not all(isinstance(message.get("content"), str) for message in self._messages):
            return None
        marks = [f"{self._mark}{i}." for i in range(len(self._messages))]
        changed = [{**message, "content": mark} for message, mark in zip(self._messages, marks, strict=True)]
        try:
            pieces = re.split(re.escape(self._mark) + r"(\d+)\.", _render(self._tokenizer, changed, self._tools))
        except RowProblem:
            return None
        if [int(number) for number in pieces[1::2]] != list(range(len(marks))):
            return None
        places, position = [], len(pieces[0])
        for message, after in zip(self._messages, pieces[2::2], strict=True):
            content = message["content"]
            variants = (content, content.strip(), content.rstrip(), content.lstrip())
            fitting = next((words for words in variants if text.startswith(words + after, position)), None)
            if fitting is None:
                return None
            places.append((position, position + len(fitting)))
            position += len(fitting) + len(after)
        return places if position == len(text) and text.startswith(pieces[0]) else None


def _why_apart(answer: _Answer, text: str, ids: list[int]) -> str:
    """Why an answer cannot share the row of the whole conversation; empty where it can."""
    if not text.startswith(answer.text):
        return REWRITTEN
    own = answer.prompt + answer.ids
    return "" if ids[: len(own)] == own else MERGED
