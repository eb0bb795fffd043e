"""Local files in, conversations out: what a data file may look like, and what is wrong with one that does not.

Two small registries: `READERS` turns a file into numbered rows by its suffix, `FORMATS` turns a row into messages by
its columns. One more file type or row format is one more entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoelora.errors import DataError, listing

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


class RowProblem(ValueError):
    """What is wrong with one row; `read_conversations` adds the file and the row."""


@dataclass(frozen=True)
class Conversation:
    """One row of a data file as chat messages.

    Args:
        messages: `{"role": ..., "content": ...}` in order; the last one is the assistant's
        path: the file it came from
        row: its number in that file, from 1 (in JSON lines: the line)
    """

    messages: list[Message]
    path: str
    row: int

    @property
    def origin(self) -> str:
        return f"{self.path}, row {self.row}"


@dataclass(frozen=True)
class RowFormat:
    """A way to write a conversation in columns.

    Args:
        name: for messages to the user
        columns: a file whose first row has all of these is of this format
        example: one row, for messages to the user
        to_messages: row -> messages; raises RowProblem
    """

    name: str
    columns: frozenset[str]
    example: str
    to_messages: Callable[[dict[str, Any]], list[Message]]


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Read and check one data file, row by row.

    Columns that the format does not know are ignored. Where several formats fit, the first in `FORMATS` is taken.

    Raises:
        DataError: the file is missing, empty or of an unknown type or unknown columns, or a row is wrong (with the
            file and the row's number)
    """
    path = Path(path)
    check_path(path)
    row_format: RowFormat | None = None
    for number, row in READERS[path.suffix.lower()](path):
        try:
            if not isinstance(row, dict):
                raise RowProblem(f"it is {_kind(row)}, but it must be an object with named columns.")
            row_format = row_format or _format_for(row)
            messages = row_format.to_messages(row)
        except RowProblem as problem:
            raise DataError(f"{path}, row {number}: {problem} Correct the row or take it out.") from None
        yield Conversation(messages, str(path), number)
    if row_format is None:
        raise DataError(f"{path} holds no rows. Give a file with at least one, e.g. {FORMATS[0].example}")


def check_path(path: Path) -> None:
    """Raise DataError unless `path` is a file of a type that `READERS` knows."""
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the path; it is relative to the folder you start in.")
    if not path.is_file():
        raise DataError(f"{path} is a folder, but it must be a file. Name the file inside it.")
    if path.suffix.lower() not in READERS:
        allowed = ", ".join(READERS)
        raise DataError(f"{path} ends in {path.suffix!r}, but it must end in one of {allowed}. Convert or rename it.")


def _format_for(row: dict[str, Any]) -> RowFormat:
    for row_format in FORMATS:
        if row_format.columns <= row.keys():
            return row_format
    known = "; ".join(f"{row_format.name}: {row_format.example}" for row_format in FORMATS)
    raise RowProblem(f"its columns are {listing(row) or '(none)'}, but they must be of a known format ({known}).")


# Files to numbered rows


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number, parsed row) of an array of objects or of JSON lines, whichever the file holds.

    JSON lines are numbered by line (blank ones are skipped), arrays by element, both from 1.

    Raises:
        DataError: the file is no UTF-8 text, or a row is no valid JSON
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = next((line.lstrip()[0] for line in file if line.strip()), "")
        yield from _read_array(path) if start == "[" else _read_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise _invalid_json(path, number, error, "one JSON object a line") from None


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    # Element by element, so that an error can name the row.
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    position = text.index("[")
    number = 0
    after = _skip_blanks(text, position + 1)
    mark = "]" if text[after : after + 1] == "]" else ","
    position = after if mark == "]" else position
    while mark == ",":
        number += 1
        try:
            row, position = decoder.raw_decode(text, _skip_blanks(text, position + 1))
            position = _skip_blanks(text, position)
            mark = text[position : position + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _invalid_json(path, number, error, "an array of objects") from None
        yield number, row
    position = _skip_blanks(text, position + 1)
    if position < len(text):
        extra = json.JSONDecodeError("Extra data after the array", text, position)
        raise _invalid_json(path, number, extra, "an array of objects")


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _invalid_json(path: Path, number: int, error: Exception, expected: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        # Of a file of JSON lines the decoder sees one line: what it calls line 1 is the row.
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        reason = f"{error.msg} at {line}column {error.colno}"
    else:
        reason = "nested too deeply"
    return DataError(f"{path}, row {number}: invalid JSON ({reason}), but the file must hold {expected}. Correct it.")


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {".json": read_json, ".jsonl": read_json}


# Rows to messages


def alpaca_messages(row: dict[str, Any]) -> list[Message]:
    """`instruction`, optional `input`, `output` -> one user and one assistant message."""
    instruction = _text(row, "instruction", "the task")
    output = _text(row, "output", "the answer that is learned")
    extra = row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        question = instruction
    else:
        question = f"{instruction}\n\n{_text(row, 'input', 'what the task is about; may be left out')}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def openai_messages(row: dict[str, Any]) -> list[Message]:
    """`messages`, a list of `{"role", "content"}` that ends with the assistant's answer."""
    turns = row.get("messages")
    if not isinstance(turns, list):
        raise RowProblem(f"messages is {_found(row, 'messages')}, but it must be a list of role and content.")
    messages = [_message(f"messages[{i}]", turn) for i, turn in enumerate(turns)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowProblem(f"messages has no assistant turn (roles: {listing(roles) or 'none'}), so nothing is learned.")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowProblem("messages has no user turn before the assistant's first, but an answer needs a question.")
    if roles[-1] != "assistant":
        raise RowProblem(f"messages ends with role {roles[-1]!r}, but it must end with the assistant's answer.")
    return messages


def _message(name: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"{name} is {_kind(turn)}, but it must be an object with role and content.")
    role = turn.get("role")
    if role not in ROLES:
        raise RowProblem(f"{name}.role is {_found(turn, 'role')}, but it must be one of {', '.join(ROLES)}.")
    # These change what is learned: to pass over them would train on something else than the file says.
    for key in ("tool_calls", "function_call"):
        if turn.get(key) is not None:
            raise RowProblem(f"{name} has {key}, but messages must be plain text.")
    if turn.get("weight") not in (None, 1):
        raise RowProblem(f"{name}.weight is {turn['weight']!r}, but every answer is learned with weight 1.")
    may_be_empty = role == "system" and turn.get("content") == ""
    content = "" if may_be_empty else _text(turn, "content", f"the {role}'s words", prefix=f"{name}.")
    return {"role": role, "content": content}


def _text(row: dict[str, Any], key: str, meaning: str, prefix: str = "") -> str:
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            problem = "holds half of a surrogate pair, but it must be of whole Unicode characters."
            raise RowProblem(f"{prefix}{key} {problem}") from None
        return value
    raise RowProblem(f"{prefix}{key} is {_found(row, key)}, but it must be a string with some text ({meaning}).")


def _found(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return f"missing (found: {listing(row) or 'nothing'})"
    value = row[key]
    if isinstance(value, str):
        return repr(value) if value.strip() else "empty"
    return _kind(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number")


FORMATS: tuple[RowFormat, ...] = (
    RowFormat(
        "messages",
        frozenset({"messages"}),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        openai_messages,
    ),
    RowFormat(
        "Alpaca",
        frozenset({"instruction"}),
        '{"instruction": "...", "input": "...", "output": "..."}',
        alpaca_messages,
    ),
)
