"""Rows as questions: what a model is asked, and what it should answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from dsmoelora.config import DataSource
from dsmoelora.data.chat import Prompt
from dsmoelora.data.choices import Choice
from dsmoelora.data.formats import read_conversations
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.turns import Message

Made = TypeVar("Made")


@dataclass(frozen=True)
class Question:
    """What one row asks.

    Args:
        path: the source it came from
        row: its number there, as in `Conversation`
        prompt: everything before the last answer of the assistant
        wanted: this answer
        choice: what there is to choose from; None for a question that is open
    """

    path: str
    row: int
    prompt: Prompt
    wanted: str
    choice: Choice | None = None


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used, and why."""

    row: int
    problem: str


def read_questions(
    source: DataSource, use: Callable[[Question], Made], on_bad_row: Literal["error", "skip"] = "error"
) -> Iterator[Made | SkippedRow]:
    """What `use` makes of each row of a source.

    Args:
        source: of conversations in any format
        use: raises a `RowProblem` for a question that cannot be used
        on_bad_row: `error` stops at the first row that cannot be used, `skip` yields it with its problem

    Raises:
        DataError: as `read_conversations`; or a row is plain text, or `use` refuses it
    """
    for conversation in read_conversations(source, on_bad_row):
        if conversation.problem:
            yield SkippedRow(conversation.row, conversation.problem)
            continue
        try:
            if not conversation.messages:
                raise RowProblem("it is plain text, which asks nothing.")
            asked = split_prompt(conversation.messages, conversation.tools)
            yield use(Question(conversation.path, conversation.row, *asked, conversation.choice))
        except RowProblem as problem:
            if on_bad_row == "error":
                raise problem.at(conversation.path, conversation.row) from None
            yield SkippedRow(conversation.row, str(problem))


def split_prompt(messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[Prompt, str]:
    """A conversation as prompt (everything before the last assistant turn) and reference answer, calls included."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in messages[last].get("tool_calls", [])]
    return Prompt(messages[:last], tools), "\n".join([messages[last]["content"], *calls]).strip()


def without_letters(question: Question) -> Question:
    """A question with choices, asked without them: the answer is the text of one."""
    assert question.choice is not None, "there is something to choose from"
    *before, last = question.prompt.messages
    asked = [*before, {**last, "content": question.choice.question}]
    wanted = question.choice.texts[question.choice.right]
    return replace(question, prompt=replace(question.prompt, messages=asked), wanted=wanted)
