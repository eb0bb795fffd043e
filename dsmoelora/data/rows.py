"""Rows to conversations: one function for each way to write one in columns.

Each takes a row and returns its chat, or the text of a row that is no conversation. `system` (or `system_prompt`),
`tools` (or `functions`) are columns that every kind of conversation may have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dsmoelora.data.choices import AnswerIs, Choice, answer_of, choices_of, list_of
from dsmoelora.data.columns import QUESTIONS, TURNS
from dsmoelora.data.keys import THOUGHTS, is_given
from dsmoelora.data.problems import RowProblem, found, kind, words
from dsmoelora.data.tools import tools_of
from dsmoelora.data.turns import Message, conversation_of, thoughts_of


@dataclass(frozen=True)
class Chat:
    """What a row says.

    Args:
        messages: in order
        learned: indices of those that are learned; None for all of the assistant's
        tools: which the assistant may call, as chat templates take them
        choice: what the last question gives to choose from; None for a question that is open
    """

    messages: list[Message]
    learned: tuple[int, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    choice: Choice | None = None


def alpaca(row: dict[str, Any]) -> Chat:
    """`instruction`, optional `input` and `history` (pairs of question and answer), `output`."""
    question = _with_context(row, text_of(row, "instruction", "the task"))
    output = text_of(row, "output", "the answer that is learned")
    messages: list[Message] = []
    for i, pair in enumerate(list_of(row, "history") if row.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(f"history[{i}] is {kind(pair)}, but it must be a list of a question and its answer.")
        messages += _exchange(*(words(f"history[{i}][{j}]", value) for j, value in enumerate(pair)))
    return _answered(row, messages + _exchange(question, output))


def prompt_completion(row: dict[str, Any]) -> Chat:
    """`prompt` and `completion`, both text: a question and its answer, rendered with the chat template."""
    for key in ("prompt", "completion"):
        if isinstance(row.get(key), list):
            raise RowProblem(f"{key} is a list, but it must be a string; write conversations as messages.")
    prompt = text_of(row, "prompt", "the question")
    return _answered(row, _exchange(prompt, text_of(row, "completion", "the answer that is learned")))


def messages(row: dict[str, Any]) -> Chat:
    """`messages`, a list of `{"role", "content"}` that ends with the assistant's answer."""
    return _conversation(row, next((key for key in TURNS if key in row), TURNS[0]))


def sharegpt(row: dict[str, Any]) -> Chat:
    """`conversations`, a list of `{"from", "value"}` that ends with gpt's answer."""
    return _conversation(row, "conversations")


def multiple_choice(row: dict[str, Any], answer_is: AnswerIs | None = None) -> Chat:
    """`question`, `choices` (texts) and `answer` (0-based number, letter or text): learned is the letter."""
    key = next((key for key in QUESTIONS if key in row), QUESTIONS[0])
    question = _with_context(row, text_of(row, key, "what is asked"))
    choices, labels = choices_of(row)
    choice = Choice(question, tuple(choices), answer_of(row, choices, labels, answer_is))
    return replace(_answered(row, _exchange(choice.listed(), choice.letters[choice.right])), choice=choice)


def plain_text(row: dict[str, Any]) -> str:
    """`text`: learned from its second token to its end."""
    for key in ("tools", "functions", *THOUGHTS):
        if is_given(row.get(key)):
            raise RowProblem(f"it has {key}, which is for the chat template, but text is not written with one.")
    return text_of(row, "text", "what is learned")


def text_of(row: dict[str, Any], key: str, meaning: str) -> str:
    """A string that must have some text."""
    if isinstance(row.get(key), str) and row[key].strip():
        return words(key, row[key])
    raise RowProblem(f"{key} is {found(row, key)}, but it must be a string with some text ({meaning}).")


# Parts of rows


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_context(row: dict[str, Any], question: str) -> str:
    extra = row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return question
    return f"{question}\n\n{text_of(row, 'input', 'what the task is about; may be left out')}"


def _answered(row: dict[str, Any], exchanges: list[Message]) -> Chat:
    """Of a row with one answer in a column of its own: what was thought before it may stand beside it."""
    exchanges[-1] |= thoughts_of("", row)
    return _completed(row, Chat(exchanges))


def _conversation(row: dict[str, Any], column: str) -> Chat:
    for key in THOUGHTS:
        if is_given(row.get(key)):
            raise RowProblem(f"it has {key} beside {column}. Put it into the turn of {column} that it belongs to.")
    return _completed(row, Chat(*conversation_of(column, list_of(row, column))))


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _completed(row: dict[str, Any], chat: Chat) -> Chat:
    """With what stands in columns of its own for every kind of conversation: system prompt and tools."""
    tools = tools_of(row)
    given = [key for key in ("system", "system_prompt") if row.get(key) is not None and not _is_blank(row[key])]
    if len(given) > 1:
        raise RowProblem("it has both system and system_prompt. Keep one of them.")
    for key in given:
        if chat.messages[0]["role"] == "system":
            raise RowProblem(f"{key} is given, but the conversation has a system message of its own. Keep one.")
        system = {"role": "system", "content": text_of(row, key, "the system prompt")}
        learned = None if chat.learned is None else tuple(i + 1 for i in chat.learned)
        return Chat([system, *chat.messages], learned, tools)
    return Chat(chat.messages, chat.learned, tools)
