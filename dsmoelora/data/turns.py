"""Turns of a conversation: who speaks, what is said, and whether it is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dsmoelora.data.keys import THOUGHTS, check_turn_keys, is_given, switch_of
from dsmoelora.data.problems import RowProblem, found, kind, shown, words
from dsmoelora.data.tools import calls_of
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
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")  # roles of turns which are nothing but calls


@dataclass(frozen=True)
class Turn:
    """One turn.

    Args:
        name: where it stands in the row, for messages
        message: role, content, and the keys that the chat template may read
        learned: whether it is an answer that is learned
        is_call: it is calls of tools alone, and goes on what the assistant said just before
    """

    name: str
    message: Message
    learned: bool
    is_call: bool = False


def conversation_of(column: str, given: list[Any]) -> tuple[list[Message], tuple[int, ...] | None]:
    """The messages of a list of turns, and which of them are learned; None for all of the assistant's.

    Raises:
        RowProblem: a turn is wrong, or they are no conversation from which an answer could be learned
    """
    turns = _joined([_turn(f"{column}[{i}]", turn) for i, turn in enumerate(given)])
    roles = [turn.message["role"] for turn in turns]
    if "assistant" not in roles:
        raise RowProblem(f"{column} has no assistant turn (roles: {listing(roles) or 'none'}), so nothing is learned.")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowProblem(f"{column} has no user turn before the assistant's first, but an answer needs a question.")
    if roles[-1] != "assistant":
        raise RowProblem(f"{column} ends with role {roles[-1]!r}, but it must end with the assistant's answer.")
    learned = tuple(i for i, turn in enumerate(turns) if turn.learned)
    if not learned:
        raise RowProblem(f"no turn of {column} is to be learned: each of the assistant's says that it is not.")
    return [turn.message for turn in turns], None if len(learned) == roles.count("assistant") else learned


def asked_messages(column: str, given: list[Any]) -> list[Message]:
    """The messages of turns that an answer is asked to, in the form that training gives them.

    Nothing is learned of them, so earlier words may be empty.

    Raises:
        RowProblem: a turn is wrong
    """
    turns = [_turn(f"{column}[{i}]", turn, may_be_empty=True) for i, turn in enumerate(given)]
    return [turn.message for turn in _joined(turns)]


def thoughts_of(name: str, given: dict[str, Any]) -> dict[str, str]:
    """What the assistant thought before it answered, under the keys that templates read.

    Raises:
        RowProblem: two keys say different things, or one is no text
    """
    thoughts = {key: words(f"{name}{key}", given[key]) for key in THOUGHTS if is_given(given.get(key))}
    if len(set(thoughts.values())) > 1:
        raise RowProblem(f"{name.rstrip('.') or 'it'} has different thoughts as {' and '.join(thoughts)}. Keep one.")
    return thoughts


def _joined(turns: list[Turn]) -> list[Turn]:
    """Calls that stand in turns of their own become part of the assistant's turn before them."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if not turn.is_call or before is None or before.message["role"] != "assistant":
            joined.append(turn)
            continue
        if before.learned != turn.learned:
            raise RowProblem(
                f"{before.name} and {turn.name} are one answer, but only one of them is to be learned. Say the same of "
                "both."
            )
        calls = [*before.message.get("tool_calls", []), *turn.message["tool_calls"]]
        joined[-1] = replace(before, message={**before.message, "tool_calls": calls})
    return joined


def _turn(name: str, turn: Any, may_be_empty: bool = False) -> Turn:
    if not isinstance(turn, dict):
        raise RowProblem(f"{name} is {kind(turn)}, but it must be an object with role and content (or from and value).")
    # Tables fill with null what a row does not have.
    role_key = "from" if "from" in turn and turn.get("role") is None else "role"
    content_key = "value" if "value" in turn and turn.get("content") is None else "content"
    given = turn.get(role_key)
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RowProblem(f"{name}.{role_key} is {found(turn, role_key)}, but it must be one of {', '.join(ROLES)}.")
    check_turn_keys(name, turn)
    is_call = str(given).lower() in _CALLS
    extra = _for_template(name, turn, role)
    if is_call:
        if "tool_calls" in extra:
            raise RowProblem(f"{name} has calls both in its {content_key} and beside it. Keep one.")
        extra["tool_calls"] = calls_of(f"{name}.{content_key}", turn.get(content_key))
        message = {"role": role, "content": "", **extra}
    else:
        has_calls = "tool_calls" in extra
        message = {"role": role, "content": _content(name, turn, content_key, role, has_calls, may_be_empty), **extra}
    return Turn(name, message, _is_learned(name, turn, role), is_call)


def _is_learned(name: str, turn: dict[str, Any], role: str) -> bool:
    switch = switch_of(name, turn)
    if switch is None:
        return role == "assistant"
    key, learned = switch
    if learned and role != "assistant":
        raise RowProblem(
            f"{name}.{key} is {shown(turn[key])}, but its role is {role}, and only the assistant is learned."
        )
    return learned


def _for_template(name: str, turn: dict[str, Any], role: str) -> dict[str, Any]:
    """Keys beside role and content that the chat template may read."""
    extra: dict[str, Any] = dict(thoughts_of(f"{name}.", turn))
    calls = [key for key in ("tool_calls", "function_call") if is_given(turn.get(key))]
    if len(calls) > 1:
        raise RowProblem(f"{name} has both tool_calls and function_call. Keep one of them.")
    if (extra or calls) and role != "assistant":
        raise RowProblem(f"{name} has {[*extra, *calls][0]}, which belongs to the assistant, but its role is {role}.")
    for key in calls:
        extra["tool_calls"] = calls_of(f"{name}.{key}", turn[key])
    if is_given(turn.get("tool_call_id")) and role != "tool":
        raise RowProblem(f"{name} has tool_call_id, which belongs to a tool's answer, but its role is {role}.")
    return extra | {
        key: words(f"{name}.{key}", turn[key]) for key in ("tool_call_id", "name") if is_given(turn.get(key))
    }


def _content(name: str, turn: dict[str, Any], key: str, role: str, has_calls: bool, may_be_empty: bool) -> str:
    content = turn.get(key)
    if isinstance(content, list) and content:
        content = "".join(_text_of_part(f"{name}.{key}[{i}]", part) for i, part in enumerate(content))
    if isinstance(content, str) and content.strip():
        return words(f"{name}.{key}", content)
    # Without words: an empty system prompt, a tool that has nothing to say, an answer that is a call.
    if content == "" and role in ("system", "tool"):
        return ""
    if has_calls and (content is None or isinstance(content, str)):
        return ""
    if may_be_empty and content == "":
        return ""
    what = found({**turn, key: content} if key in turn else turn, key)
    raise RowProblem(f"{name}.{key} is {what}, but it must be a string with some text (the {role}'s words).")


def _text_of_part(name: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise RowProblem(f"{name} is {kind(part)}, but it must be an object with type and text.")
    if part.get("type") != "text":
        raise RowProblem(f"{name}.type is {found(part, 'type')}, but it must be 'text': only text is read.")
    more = [key for key, value in part.items() if key not in ("type", "text") and is_given(value)]
    if more or not isinstance(part.get("text"), str):
        what = f"has the key {more[0]!r}" if more else f"has a text which is {found(part, 'text')}"
        raise RowProblem(f"{name} {what}, but it must be an object with type and text alone.")
    return str(part["text"])
