"""JSON files to numbered rows: an array of rows, or one row a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dsmoelora.data.not_rows import is_conversation, nested_cause, table_cause
from dsmoelora.data.problems import RowProblem, undecodable
from dsmoelora.errors import DataError, listing

_BLANKS = " \t\n\r"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """A text file, of which a byte that is no UTF-8 is known again with `undecodable`.

    Raises:
        DataError: it is UTF-16
    """
    with path.open("rb") as file:
        if file.read(2) in _UTF16:
            raise DataError(f"{path} is not UTF-8 text (it is UTF-16). Save it as UTF-8.")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number, parsed row) of an array of rows or of JSON lines, whichever the file holds.

    JSON lines are numbered by line (blank ones are skipped), arrays by element, both from 1. A wrong row comes as a
    `RowProblem`, for those after it can be read all the same. NaN, which pandas and Python write, is null.

    Raises:
        DataError: the file is no UTF-8 text, or an array is no valid JSON
    """
    yield from _read_array(path) if is_array(path) else _read_lines(path)


def is_array(path: Path) -> bool:
    """Whether a JSON file holds an array, which is read as a whole, rather than one row a line.

    A list on a line is a row, a conversation, where its items are turns or where the next line is a list too.

    Raises:
        DataError: the file is UTF-16
    """
    with open_text(path) as file:
        lines = (line for line in file if line.strip(_BLANKS))
        first = next(lines, "")
        if not first.lstrip(_BLANKS).startswith("["):
            return False
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            return True
        return not (is_conversation(row) or next(lines, "").lstrip(_BLANKS).startswith("["))


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    decoder = _Decoder()
    with open_text(path) as file:  # any line ends, which JSON allows between rows alone
        for number, line in enumerate(file, start=1):
            text = line.strip(_BLANKS)
            if not text:
                continue
            try:
                row = undecodable(text) or decoder.row(text)
            except (json.JSONDecodeError, RecursionError) as error:
                _refuse_one_object(path)
                row = _invalid_json(error, "one JSON object a line")
            yield number, row


def _refuse_one_object(path: Path) -> None:
    """A file that is one object over many lines would be reported as a wrong line: say what it is."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if file.readline().strip() != "{":
                return
            whole = json.loads("{" + file.read())
    except (ValueError, RecursionError):
        return
    table = table_cause(whole, str(path))
    if table:
        raise DataError(f"{path}: {table}")
    cause = nested_cause(whole)
    remedy = cause if cause.startswith("The rows") else "Put it on one line."
    raise DataError(
        f"{path} holds one object over many lines (fields: {listing(whole)}), but it must hold an array of objects or "
        f"one object a line. {remedy}"
    )


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    # Element by element, so that an error can name the row.
    with open_text(path) as file:
        text = file.read()
    decoder = _Decoder()
    position = text.index("[")
    number = 0
    after = _skip_blanks(text, position + 1)
    mark = "]" if text[after : after + 1] == "]" else ","
    position = after if mark == "]" else position
    while mark == ",":
        number += 1
        begin = _skip_blanks(text, position + 1)
        try:
            row, position = decoder.row_at(text, begin)
            row = undecodable(text[begin:position]) or row
            position = _skip_blanks(text, position)
            mark = text[position : position + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken_array(path, number, error) from None
        yield number, row
    position = _skip_blanks(text, position + 1)
    if position < len(text):
        raise _broken_array(path, number, json.JSONDecodeError("Extra data after the array", text, position))


class _Decoder:
    """Reads rows of JSON; one with a number that Python does not read is a `RowProblem`, and the next can be read."""

    def __init__(self) -> None:
        self._too_long = 0
        self._json = json.JSONDecoder(parse_constant=lambda name: None, parse_int=self._integer)

    def row(self, text: str) -> Any:
        """The row that a text is."""
        self._too_long = 0
        return self._checked(self._json.decode(text))

    def row_at(self, text: str, begin: int) -> tuple[Any, int]:
        """The row that begins there, and where it ends."""
        self._too_long = 0
        row, end = self._json.raw_decode(text, begin)
        return self._checked(row), end

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's limit on digits
            self._too_long = max(self._too_long, len(digits.lstrip("-")))
            return 0

    def _checked(self, row: Any) -> Any:
        if not self._too_long:
            return row
        return RowProblem(f"it has a whole number of {self._too_long:,} digits, which is too long to be read.")


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in tuple(_BLANKS):
        position += 1
    return position


def _broken_array(path: Path, number: int, error: Exception) -> DataError:
    return DataError(f"{path}, row {number}: {_invalid_json(error, 'an array of objects')} Correct it.")


def _invalid_json(error: Exception, expected: str) -> RowProblem:
    if isinstance(error, json.JSONDecodeError):
        # Of a file of JSON lines the decoder sees one line: what it calls line 1 is the row.
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        reason = f"{error.msg} at {line}column {error.colno}"
    else:
        reason = "nested too deeply"
    return RowProblem(f"invalid JSON ({reason}), but the file must hold {expected}.")
