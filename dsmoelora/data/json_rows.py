"""JSON files to numbered rows: an array of objects, or one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoelora.data.problems import RowProblem
from dsmoelora.errors import DataError, listing

_BLANKS = " \t\n\r"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number, parsed row) of an array of objects or of JSON lines, whichever the file holds.

    JSON lines are numbered by line (blank ones are skipped), arrays by element, both from 1. A wrong line comes as a
    `RowProblem`, for the lines after it can be read all the same. NaN, which pandas and Python write, is null.

    Raises:
        DataError: the file is no UTF-8 text, or an array is no valid JSON
    """
    yield from _read_array(path) if is_array(path) else _read_lines(path)


def is_array(path: Path) -> bool:
    """Whether a JSON file holds an array, which is read as a whole, rather than one object a line.

    Raises:
        DataError: the file is no UTF-8 text
    """
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    if first.startswith(_UTF16):
        raise DataError(f"{path} is not UTF-8 text (it is UTF-16). Save it as UTF-8.")
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    decode = _decoder().decode
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(_BLANKS)
                if not text:
                    continue
                row = decode(text)
            except UnicodeDecodeError as error:
                row = RowProblem(f"it is not UTF-8 text ({error.reason}). Save the file as UTF-8.")
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
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    remedy = f"Save the list under {lists[0]!r} as a file of its own." if lists else "Put it on one line."
    raise DataError(
        f"{path} holds one object over many lines (fields: {listing(whole)}), but it must hold an array of objects or "
        f"one object a line. {remedy}"
    )


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    # Element by element, so that an error can name the row.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    decoder = _decoder()
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
            raise _broken_array(path, number, error) from None
        yield number, row
    position = _skip_blanks(text, position + 1)
    if position < len(text):
        raise _broken_array(path, number, json.JSONDecodeError("Extra data after the array", text, position))


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=lambda name: None)


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
