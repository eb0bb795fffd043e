"""Tools, and calls of tools, in the form that chat templates take: OpenAI's, with arguments as objects."""

from __future__ import annotations

import json
from typing import Any

from dsmoelora.data.keys import is_given
from dsmoelora.data.problems import RowProblem, found, half_a_pair, kind

_CALL_KEYS = {"id", "type", "function", "index"}


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row's `tools` or `functions`: a list, or the JSON text of one; None without any.

    Raises:
        RowProblem: they are no descriptions of functions
    """
    given = [key for key in ("tools", "functions") if is_given(row.get(key)) and row[key] != "[]"]
    if not given:
        return None
    if len(given) > 1:
        raise RowProblem("it has both tools and functions. Keep one of them.")
    (key,) = given
    value = parsed(key, row[key])
    if not isinstance(value, list):
        raise RowProblem(f"{key} is {kind(value)}, but it must be a list of functions.")
    return [_tool(f"{key}[{i}]", each) for i, each in enumerate(value)] or None


def calls_of(name: str, value: Any) -> list[dict[str, Any]]:
    """Calls of tools: a list of them, a single one, or the JSON text of either.

    Raises:
        RowProblem: they are something else
    """
    value = parsed(name, value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowProblem(f"{name} is an empty list, but it must hold a call.")
    return [_call(f"{name}[{i}]" if isinstance(value, list) else name, call) for i, call in enumerate(calls)]


def parsed(name: str, value: Any) -> Any:
    """A JSON value, or what the text of one says.

    Raises:
        RowProblem: it is no JSON, nested too deeply, or holds half of a surrogate pair
    """
    try:
        if isinstance(value, str):
            value = json.loads(value, parse_constant=lambda _: None)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise half_a_pair(name) from None
    except RecursionError:
        raise RowProblem(f"{name} is nested too deeply.") from None
    except (ValueError, TypeError) as error:
        reason = str(error).split(";")[0]
        raise RowProblem(f"{name} is {found({name: value}, name)}, but it must be JSON ({reason}).") from None
    return value


def _tool(name: str, value: Any) -> dict[str, Any]:
    value = _object(name, value)
    if is_given(value.get("function")) and value.get("type") in (None, "function"):
        value = _object(f"{name}.function", value["function"])
    elif value.get("type") not in (None, "function"):
        raise RowProblem(f"{name}.type is {found(value, 'type')}, but tools must be functions.")
    function = {key: each for key, each in value.items() if key != "type"}
    _check_name(name, function)
    if is_given(function.get("parameters")):
        function["parameters"] = _object(f"{name}.parameters", function["parameters"])
    return {"type": "function", "function": function}


def _call(name: str, value: Any) -> dict[str, Any]:
    value = _object(name, value)
    if not is_given(value.get("function")):  # the function itself, as ShareGPT and the old OpenAI form have it
        function = {key: each for key, each in value.items() if key not in _CALL_KEYS}
        value = {key: each for key, each in value.items() if key in _CALL_KEYS} | {"function": function}
    function = _object(f"{name}.function", value["function"])
    unknown = [key for key in value if key not in _CALL_KEYS and is_given(value[key])]
    unknown += [key for key in function if key not in ("name", "arguments") and is_given(function[key])]
    if unknown:
        raise RowProblem(f"{name} has the key {unknown[0]!r}, but a call has id, type, name and arguments alone.")
    if value.get("type") not in (None, "function"):
        raise RowProblem(f"{name}.type is {found(value, 'type')}, but only functions can be called.")
    _check_name(name, function)
    arguments = function.get("arguments")
    arguments = _object(f"{name}.arguments", arguments) if is_given(arguments) else {}
    identity = {"id": value["id"]} if is_given(value.get("id")) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _object(name: str, value: Any) -> dict[str, Any]:
    value = parsed(name, value)
    if not isinstance(value, dict):
        raise RowProblem(f"{name} is {kind(value)}, but it must be an object.")
    return value


def _check_name(name: str, function: dict[str, Any]) -> None:
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowProblem(f"{name}.name is {found(function, 'name')}, but it must be the name of a function.")
