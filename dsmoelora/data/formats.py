"""Sources in, conversations out: which way of writing a row a file uses, and what is wrong with one that uses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsmoelora.config import DataSource
from dsmoelora.data import rows
from dsmoelora.data.problems import FormatProblem, RowProblem, kind
from dsmoelora.data.readers import RowSource, open_source
from dsmoelora.data.rows import Message
from dsmoelora.errors import DataError, listing


@dataclass(frozen=True)
class Conversation:
    """One row of a source.

    Args:
        messages: `{"role": ..., "content": ...}` in order; the last one is the assistant's
        path: the source it came from
        row: its number there, from 1 (in JSON lines and CSV: the line)
        text: what is learned of a row that is no conversation; then there are no messages
        problem: why the row is skipped; then there is nothing else
        learned: indices of the messages that are learned; None for every answer of the assistant
        tools: handed to the chat template
    """

    messages: list[Message]
    path: str
    row: int
    text: str = ""
    problem: str = ""
    learned: tuple[int, ...] | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def origin(self) -> str:
        return f"{self.path}, row {self.row}"


@dataclass(frozen=True)
class RowFormat:
    """A way to write a conversation in columns.

    Args:
        columns: a file whose first row has all of these is of this format ...
        unless: ... but not if it has one of these
        parse: row -> messages, or text; raises RowProblem
    """

    columns: frozenset[str]
    unless: frozenset[str]
    parse: Callable[[dict[str, Any]], list[Message] | str]


def _format(columns: str, parse: Callable[[dict[str, Any]], list[Message] | str], unless: str = "") -> RowFormat:
    return RowFormat(frozenset(columns.split()), frozenset(unless.split()), parse)


# Where a column holds the written answer, choices are but a remark; where anything else fits, text is the whole of it.
_ANSWERS = "output completion"
FORMATS: dict[str, RowFormat] = {
    "messages": _format("messages", rows.messages),
    "sharegpt": _format("conversations", rows.sharegpt),
    "alpaca": _format("instruction output", rows.alpaca),
    "prompt_completion": _format("prompt completion", rows.prompt_completion),
    "multiple_choice": _format("choices answer", rows.multiple_choice, _ANSWERS),
    "text": _format("text", rows.plain_text),
}


class RowParser:
    """Turns rows of one source into conversations; where the format is `auto`, the first row that has one decides.

    Args:
        source: what the rows come from
        name: of the source, for messages
        on_bad_row: `error` raises at a wrong row, `skip` gives it back with its problem
    """

    def __init__(self, source: DataSource, name: str, on_bad_row: Literal["error", "skip"]) -> None:
        self._fields, self._name, self._on_bad_row = source.fields, name, on_bad_row
        self._parse = None if source.format == "auto" else FORMATS[source.format].parse
        self._first_problem: DataError | None = None

    def __call__(self, number: int, row: Any) -> Conversation:
        """The conversation of a row.

        Raises:
            DataError: the row is wrong
        """
        try:
            row = _renamed(row, self._fields)
            rows.refuse_unlearnable(row)
            self._parse = self._parse or FORMATS[_format_of(row)].parse
            parsed = self._parse(row)
        except RowProblem as problem:
            self._first_problem = self._first_problem or problem.at(self._name, number)
            if self._on_bad_row == "error":
                raise self._first_problem from None
            return Conversation([], self._name, number, problem=str(problem))
        if isinstance(parsed, str):
            return Conversation([], self._name, number, parsed)
        return Conversation(parsed, self._name, number)

    def check_found(self) -> None:
        """After the last row: there was one whose format is known.

        Raises:
            DataError: there was none
        """
        if self._parse is None:
            raise self._first_problem or DataError(f"{self._name} holds no rows. Give a file with at least one.")


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
        DataError: the source is missing, empty, of an unknown type or of unknown columns, or a row is wrong
    """
    opened = opened or open_source(source)
    parser = parser or RowParser(source, opened.name, on_bad_row)
    for number, row in opened.read():
        yield parser(number, row)
    parser.check_found()


def _renamed(row: Any, fields: dict[str, str]) -> dict[str, Any]:
    """The row under the names that the formats know."""
    if isinstance(row, RowProblem):
        raise row
    if not isinstance(row, dict):
        raise RowProblem(f"it is {kind(row)}, but it must be an object with named columns.")
    for name, column in fields.items():
        if column not in row:
            raise RowProblem(f"fields says that {name} is in column {column!r}, but its columns are {listing(row)}.")
    return {**row, **{name: row[column] for name, column in fields.items()}}


def _format_of(row: dict[str, Any]) -> str:
    row = {"answer": row["answerKey"], **row} if "answerKey" in row else row
    fitting = [name for name, known in FORMATS.items() if known.columns <= row.keys() and not known.unless & row.keys()]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise FormatProblem(
            f"its columns are {listing(row)}, which fit several formats. Say which one is meant beside the path, "
            f"e.g. format: {' or format: '.join(fitting)}."
        )
    raise FormatProblem(_no_format(row))


def _no_format(row: dict[str, Any]) -> str:
    nearest = [
        f"{name} lacks {listing(sorted(known.columns - row.keys()))}"
        for name, known in FORMATS.items()
        if known.columns & row.keys()
    ]
    what = f"its columns are {listing(row) or '(none)'}, which fit no known format"
    what += f" ({'; '.join(nearest)})." if nearest else "."
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return f"{what} The rows seem to be under {key!r}: save that list as a file of its own."
    known = "; ".join(f"{name}: {' + '.join(sorted(form.columns))}" for name, form in FORMATS.items())
    return (
        f"{what} Known are {known}. Rename the columns (in CSV: in the first line), or name them beside the path, e.g. "
        "fields: {instruction: question, output: reply}."
    )
