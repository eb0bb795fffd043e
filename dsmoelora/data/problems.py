"""What is wrong with single rows, and how it is said."""

from __future__ import annotations

from typing import Any

from dsmoelora.errors import DataError, listing


class RowProblem(ValueError):
    """What is wrong with one row, in words that go after the file's name and the row's number."""

    def at(self, name: str, row: int) -> DataError:
        """The same as a message that a user can act on."""
        return DataError(f"{name}, row {row}: {self} Correct the row or take it out, or set data.on_bad_row: skip.")


class FormatProblem(RowProblem):
    """A row whose format is unknown or unclear, and with it that of the whole file."""

    def at(self, name: str, row: int) -> DataError:
        """The same as a message; to leave the row out would not help."""
        return DataError(f"{name}, row {row}: {self}")


def found(row: dict[str, Any], key: str) -> str:
    """What stands under a key, for messages."""
    if key not in row:
        return f"missing (found: {listing(row) or 'nothing'})"
    value = row[key]
    if isinstance(value, str):
        return _shortened(value) if value.strip() else "empty"
    return kind(value)


def shown(value: Any) -> str:
    """A value as its file writes it, where it is short; otherwise what kind of value it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else found({"": value}, "")


def words(name: str, value: Any) -> str:
    """A string that must have some text, of whole characters.

    Raises:
        RowProblem: it is something else
    """
    if not isinstance(value, str) or not value.strip():
        raise RowProblem(f"{name} is {found({name: value}, name)}, but it must be a string with some text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise half_a_pair(name) from None
    return value


def half_a_pair(name: str) -> RowProblem:
    """A text that UTF-8 cannot write."""
    return RowProblem(f"{name} holds half of a surrogate pair, but it must be of whole Unicode characters.")


def kind(value: Any) -> str:
    """A value's type in plain words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else f"of type {type(value).__name__}")


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def undecodable(text: str) -> RowProblem | None:
    """What is wrong with text that was read with `surrogateescape`, where it holds bytes that are no UTF-8."""
    try:
        text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        return RowProblem(f"it is not UTF-8 text ({error.reason}). Save the file as UTF-8.")
    return None
