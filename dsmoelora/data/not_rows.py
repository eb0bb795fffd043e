"""JSON that is no row, although it holds rows: what it is, and how to make rows of it."""

from __future__ import annotations

import shlex
from typing import Any

from dsmoelora.data.columns import format_of
from dsmoelora.data.problems import FormatProblem

_AS_THEY_ARE = ", dtype=False, convert_dates=False"


def is_conversation(value: Any) -> bool:
    """Whether it is a list of turns."""
    return isinstance(value, list) and bool(value) and all(is_turn(item) for item in value)


def is_turn(value: Any) -> bool:
    """Whether it is what somebody says, which is never a whole row."""
    return isinstance(value, dict) and isinstance(value.get("role", value.get("from")), str)


def table_cause(whole: dict[str, Any], path: str) -> str:
    """What an object is that holds a whole table as pandas writes one, and the remedy; empty where it is none."""
    orient = _orient(whole)
    if not orient:
        return ""
    options = "" if orient == "table" else _AS_THEY_ARE  # which has types of its own
    code = f"import pandas; pandas.read_json({path!r}, orient={orient!r}{options}).to_json('rows.jsonl', "
    code += "orient='records', lines=True, force_ascii=False)"
    return (
        f"it is a whole table, as pandas writes it with orient={orient!r}, but the file must hold one object a row. "
        f"Write it anew as rows.jsonl: python -c {shlex.quote(code)}"
    )


def nested_cause(whole: dict[str, Any]) -> str:
    """Where the rows of an object of no known format are, or what else it is, and the remedy; empty if unknown."""
    if is_turn(whole):
        return (
            "it is a single turn of a conversation, but a row must be a whole one. Put the turns of each conversation "
            'into one list, {"messages": [...]}.'
        )
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    for key, value in lists.items():
        if is_conversation(value):
            return f"The conversation seems to be under {key!r}: say so beside the path, fields: {{messages: {key}}}."
    for key, value in lists.items():
        if all(isinstance(item, dict) or is_conversation(item) for item in value):
            return f"The rows seem to be under {key!r}: save that list as a file of its own."
    return ""


def _orient(whole: dict[str, Any]) -> str:
    """The `orient` of pandas' to_json that gives such an object."""
    if isinstance(whole.get("columns"), list) and isinstance(whole.get("data"), list):
        return "split"
    if isinstance(whole.get("schema"), dict) and isinstance(whole.get("data"), list):
        return "table"
    values = list(whole.values())
    if not values or not all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
        return ""
    outer, inner = list(whole), list(values[0])
    if _is_index(inner) or (_is_format(outer) and not _is_format(inner)):
        return "columns"
    return "index" if _is_index(outer) or _is_format(inner) else ""


def _is_index(names: list[str]) -> bool:
    return bool(names) and all(name.isdecimal() for name in names)


def _is_format(names: list[str]) -> bool:
    try:
        return bool(format_of(names))
    except FormatProblem:
        return False
