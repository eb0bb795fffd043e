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


def kind(value: Any) -> str:
    """A value's type in plain words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else f"of type {type(value).__name__}")


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
