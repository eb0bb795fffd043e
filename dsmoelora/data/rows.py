"""Rows to conversations: one function for each way to write one in columns.

Each takes a row and returns its messages, or the text of a row that is no conversation. `system` (or `system_prompt`)
is a column that every kind of conversation may have.
"""

from __future__ import annotations

import ast
import json
import string
from typing import Any

from dsmoelora.data.problems import RowProblem, found, kind
from dsmoelora.errors import listing

Message = dict[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
QUESTIONS = ("question", "question_stem", "instruction")


def alpaca(row: dict[str, Any]) -> list[Message]:
    """`instruction`, optional `input` and `history` (pairs of question and answer), `output`."""
    question = _with_context(row, text_of(row, "instruction", "the task"))
    output = text_of(row, "output", "the answer that is learned")
    messages: list[Message] = []
    for i, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(f"history[{i}] is {kind(pair)}, but it must be a list of a question and its answer.")
        messages += _exchange(*(_words(f"history[{i}][{j}]", value) for j, value in enumerate(pair)))
    return _with_system(row, messages + _exchange(question, output))


def prompt_completion(row: dict[str, Any]) -> list[Message]:
    """`prompt` and `completion`, both text: a question and its answer, rendered with the chat template."""
    for key in ("prompt", "completion"):
        if isinstance(row.get(key), list):
            raise RowProblem(f"{key} is a list, but it must be a string; write conversations as messages.")
    prompt = text_of(row, "prompt", "the question")
    return _with_system(row, _exchange(prompt, text_of(row, "completion", "the answer that is learned")))


def messages(row: dict[str, Any]) -> list[Message]:
    """`messages`, a list of `{"role", "content"}` that ends with the assistant's answer."""
    return _conversation(row, "messages")


def sharegpt(row: dict[str, Any]) -> list[Message]:
    """`conversations`, a list of `{"from", "value"}` that ends with gpt's answer."""
    return _conversation(row, "conversations")


def multiple_choice(row: dict[str, Any]) -> list[Message]:
    """`question`, `choices` (texts) and `answer` (0-based number or letter): learned is the letter."""
    key = next((key for key in QUESTIONS if key in row), QUESTIONS[0])
    question = _with_context(row, text_of(row, key, "what is asked"))
    choices, labels = _choices(row)
    letters = string.ascii_uppercase[: len(choices)]
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return _with_system(row, _exchange(f"{question}\n\n{lines}", letters[_answer(row, len(choices), labels)]))


def plain_text(row: dict[str, Any]) -> str:
    """`text`: learned from its second token to its end."""
    return text_of(row, "text", "what is learned")


def text_of(row: dict[str, Any], key: str, meaning: str) -> str:
    """A string that must have some text."""
    if isinstance(row.get(key), str) and row[key].strip():
        return _words(key, row[key])
    raise RowProblem(f"{key} is {found(row, key)}, but it must be a string with some text ({meaning}).")


def refuse_unlearnable(row: dict[str, Any]) -> None:
    """A row that marks its answer as bad, or has parts that are not text, would teach something else than it says.

    Raises:
        RowProblem: it is such a row
    """
    for key in ("label", "kto_tag"):
        if str(row.get(key)).strip().casefold() == "false":  # CSV has words alone
            raise RowProblem(
                f"{key} is false, which marks a bad answer, but every answer is learned. Leave the row out."
            )
    if row.get("rejected"):
        raise RowProblem("rejected holds an answer not to give, but only good answers are learned. Drop the column.")
    for key in ("images", "videos", "audios"):
        if row.get(key):
            raise RowProblem(f"{key} is given, but only text is learned. Leave the row out.")


# Parts of rows


def _words(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        what = found({name: value}, name)
        raise RowProblem(f"{name} is {what}, but it must be a string with some text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(
            f"{name} holds half of a surrogate pair, but it must be of whole Unicode characters."
        ) from None
    return value


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_context(row: dict[str, Any], question: str) -> str:
    extra = row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return question
    return f"{question}\n\n{text_of(row, 'input', 'what the task is about; may be left out')}"


def _with_system(row: dict[str, Any], conversation: list[Message]) -> list[Message]:
    for key in ("system", "system_prompt"):
        value = row.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if conversation[0]["role"] == "system":
            raise RowProblem(f"{key} is given, but the conversation has a system message of its own. Keep one.")
        return [{"role": "system", "content": text_of(row, key, "the system prompt")}, *conversation]
    return conversation


def _conversation(row: dict[str, Any], column: str) -> list[Message]:
    turns = [_message(f"{column}[{i}]", turn) for i, turn in enumerate(_list(row, column))]
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise RowProblem(f"{column} has no assistant turn (roles: {listing(roles) or 'none'}), so nothing is learned.")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowProblem(f"{column} has no user turn before the assistant's first, but an answer needs a question.")
    if roles[-1] != "assistant":
        raise RowProblem(f"{column} ends with role {roles[-1]!r}, but it must end with the assistant's answer.")
    return _with_system(row, turns)


def _message(name: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"{name} is {kind(turn)}, but it must be an object with role and content (or from and value).")
    # Tables fill with null what a row does not have.
    role_key = "from" if "from" in turn and turn.get("role") is None else "role"
    content_key = "value" if "value" in turn and turn.get("content") is None else "content"
    given = turn.get(role_key)
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RowProblem(f"{name}.{role_key} is {found(turn, role_key)}, but it must be one of {', '.join(ROLES)}.")
    # These change what is learned: to pass over them would train on something else than the file says.
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise RowProblem(f"{name} has {key}, but messages must be plain text.")
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise RowProblem(f"{name}.weight is {turn['weight']!r}, but every answer is learned with weight 1.")
    content = turn.get(content_key)
    if role == "system" and content == "":
        return {"role": role, "content": ""}
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
        return {"role": role, "content": _words(f"{name}.{content_key}", content)}
    if isinstance(content, str) and content.strip():
        return {"role": role, "content": _words(f"{name}.{content_key}", content)}
    what = found(turn, content_key)
    raise RowProblem(f"{name}.{content_key} is {what}, but it must be a string with some text (the {role}'s words).")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _list(row: dict[str, Any], key: str) -> list[Any]:
    """A list, or the text of one: files without nested types, such as CSV, have no other way to write it."""
    value = row.get(key)
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, list):
        raise RowProblem(f"{key} is {found({**row, key: value} if key in row else row, key)}, but it must be a list.")
    return value


# Multiple choice


def _choices(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The texts, and the labels that come with them; none where choices are counted."""
    given, labels = row.get("choices"), None
    if isinstance(given, dict) and "text" in given:  # {"text": [...], "label": [...]}, as on the hub
        labels = given.get("label")
        row = {**row, "choices": given["text"]}
    texts = [_words(f"choices[{i}]", text) for i, text in enumerate(_list(row, "choices"))]
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise RowProblem(f"choices has {len(texts)} entries, but it must have 2 to {len(string.ascii_uppercase)}.")
    if labels is None:
        return texts, []
    names = [_label(label) for label in _list({"choices.label": labels}, "choices.label")]
    if len(names) != len(texts) or len({name.casefold() for name in names}) != len(texts):
        raise RowProblem(
            f"choices.label is {', '.join(names) or 'empty'}, but it must have another label for each of the "
            f"{len(texts)} entries of choices.text."
        )
    return texts, names


def _label(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps, as pandas keeps it
        value = int(value)
    return str(value).strip()


def _answer(row: dict[str, Any], num_choices: int, labels: list[str]) -> int:
    """Which choice is right: one of the labels where there are any, otherwise a letter or a 0-based number.

    A number beside labels is a label too: where they begin with 1, so does the count.
    """
    key = "answerKey" if "answerKey" in row and "answer" not in row else "answer"
    answer = row.get(key)
    letters, numbers = string.ascii_uppercase[:num_choices], map(str, range(num_choices))
    if isinstance(answer, str | int | float):
        name = _label(answer).casefold()
        for known in (labels,) if labels else (letters, numbers):
            folded = [each.casefold() for each in known]
            if name in folded:
                return folded.index(name)
    what = repr(answer) if isinstance(answer, int) else found(row, key)
    allowed = f"one of {', '.join(labels or letters)}"
    if not labels:
        allowed = f"one of 0 to {num_choices - 1} (counted from 0) or {allowed}"
    raise RowProblem(f"{key} is {what}, but it must be {allowed}, for choices has {num_choices} entries.")
