"""Sources in, conversations out: which way of writing a row a file uses, and what is wrong with one that uses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dsmoelora.config import DataSource
from dsmoelora.data import rows
from dsmoelora.data.choices import Choice
from dsmoelora.data.columns import format_of
from dsmoelora.data.keys import check_row_is_learned, check_row_is_text
from dsmoelora.data.not_rows import is_conversation, nested_cause, table_cause
from dsmoelora.data.problems import FormatProblem, RowProblem, kind
from dsmoelora.data.readers import RowSource, open_source
from dsmoelora.data.rows import Chat
from dsmoelora.data.turns import Message
from dsmoelora.errors import DataError, listing


@dataclass(frozen=True)
class Conversation:
    """One row of a source.

    Args:
        messages: role, content and other keys that chat templates read, in order; the last one is the assistant's
        path: the source it came from
        row: its number there, from 1 (in JSON lines and CSV: the line)
        text: what is learned of a row that is no conversation; then there are no messages
        problem: why the row is skipped; then there is nothing else
        learned: indices of the messages that are learned; None for all of the assistant's
        tools: handed to the chat template
        choice: what the last question gives to choose from; None for a question that is open
    """

    messages: list[Message]
    path: str
    row: int
    text: str = ""
    problem: str = ""
    learned: tuple[int, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    choice: Choice | None = None

    @property
    def origin(self) -> str:
        return f"{self.path}, row {self.row}"


Parse = Callable[[dict[str, Any]], Chat | str]
PARSERS: dict[str, Parse] = {
    "messages": rows.messages,
    "sharegpt": rows.sharegpt,
    "alpaca": rows.alpaca,
    "prompt_completion": rows.prompt_completion,
    "multiple_choice": rows.multiple_choice,
    "text": rows.plain_text,
}
_WITH_CLASSES = ("multiple_choice", "text")  # where a number under `label` is an answer or a class


class RowParser:
    """Turns rows of one source into conversations; where the format is `auto`, the first row that has one decides.

    Args:
        source: what the rows come from
        name: of the source, for messages
        on_bad_row: `error` raises at a wrong row, `skip` gives it back with its problem
    """

    def __init__(self, source: DataSource, name: str, on_bad_row: Literal["error", "skip"]) -> None:
        self._source, self._name, self._on_bad_row = source, name, on_bad_row
        self._format = None if source.format == "auto" else source.format
        self._has_right_row = False
        self._first_problem: tuple[int, RowProblem] | None = None

    def __call__(self, number: int, row: Any) -> Conversation:
        """The conversation of a row.

        Raises:
            DataError: the row is wrong
        """
        try:
            parsed = self._parsed(row)
        except RowProblem as problem:
            cause = table_cause(row, self._source.path) if isinstance(row, dict) else ""
            problem = FormatProblem(cause) if cause else problem
            self._first_problem = self._first_problem or (number, problem)
            if self._on_bad_row == "error":
                raise problem.at(self._name, number) from None
            return Conversation([], self._name, number, problem=str(problem))
        self._has_right_row = True
        if isinstance(parsed, str):
            return Conversation([], self._name, number, parsed)
        rest: dict[str, Any] = {"learned": parsed.learned, "tools": parsed.tools, "choice": parsed.choice}
        return Conversation(parsed.messages, self._name, number, **rest)

    def _parsed(self, given: Any) -> Chat | str:
        if isinstance(given, RowProblem):
            raise given
        if is_conversation(given):  # a file of conversations alone
            given = {"conversations" if self._format == "sharegpt" else "messages": given}
        row, renamed = _renamed(given, self._source.fields), self._source.fields.values()
        check_row_is_text(row, renamed)
        self._format = self._format or self._found_format(row)
        check_row_is_learned(row, renamed, self._format in _WITH_CLASSES)
        parse = PARSERS[self._format]
        if self._format == "multiple_choice":
            parse = partial(rows.multiple_choice, answer_is=self._source.answer_is)
        return parse(row)

    def _found_format(self, row: dict[str, Any]) -> Any:
        try:
            found = format_of(row)
        except FormatProblem as problem:
            cause = nested_cause(row)
            raise FormatProblem(f"{str(problem).partition('. Known are ')[0]}. {cause}") if cause else problem from None
        if found != "multiple_choice" and self._source.answer_is is not None:
            raise FormatProblem(
                f"answer_is is {self._source.answer_is!r}, but these rows are of format {found}, which has no answer "
                "to be read in several ways. Drop answer_is, or set format: multiple_choice."
            )
        return found

    def check_found(self) -> None:
        """After the last row: there was a right one.

        Raises:
            DataError: there was none
        """
        if self._has_right_row:
            return
        if self._first_problem is None:
            raise DataError(f"{self._name} holds no rows. Give a file with at least one.")
        number, problem = self._first_problem
        if isinstance(problem, FormatProblem):
            raise problem.at(self._name, number)
        raise DataError(f"every row of {self._name} is wrong: row {number}: {problem} Correct the rows.")


def read_conversations(
    source: DataSource,
    on_bad_row: Literal["error", "skip"] = "error",
    opened: RowSource | None = None,
    parser: RowParser | None = None,
) -> Iterator[Conversation]:
    """Read and check one source, row by row. Columns that the format does not know are ignored.

    Args:
        source: what to read
        on_bad_row: `error` stops at the first wrong row, `skip` yields it with its problem
        opened: the same source, where it is open already
        parser: of the source, where the caller wants to go on with it; None for a new one

    Raises:
        DataError: the source is missing, empty, of an unknown type or of unknown columns, or a row (with `skip`: every
            row) is wrong
    """
    opened = opened or open_source(source)
    parser = parser or RowParser(source, opened.name, on_bad_row)
    for number, row in opened.read():
        yield parser(number, row)
    parser.check_found()


def _renamed(row: Any, fields: dict[str, str]) -> dict[str, Any]:
    """The row under the names that the formats know."""
    if not isinstance(row, dict):
        raise RowProblem(f"it is {kind(row)}, but it must be an object with named columns.")
    for name, column in fields.items():
        if column not in row:
            raise RowProblem(f"fields says that {name} is in column {column!r}, but its columns are {listing(row)}.")
    return {**row, **{name: row[column] for name, column in fields.items()}}
