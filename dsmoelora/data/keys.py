"""What happens to every key of a row and of a turn. The table of docs/data.md says the same."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dsmoelora.data.problems import RowProblem, shown


class Use(Enum):
    """What happens to a key that holds something; null, empty text and empty lists count as left out."""

    READ = "read"
    SWITCH = "learned or not"
    TEMPLATE = "to the chat template"
    NEGATIVE = "refused where it says not to learn"
    REFUSED = "refused"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Key:
    """What a key does in a turn of a conversation, and beside the conversation as a column of the row."""

    turn: Use
    row: Use


def _keys(names: str, turn: Use, row: Use) -> dict[str, Key]:
    return dict.fromkeys(names.split(), Key(turn, row))


# A key of a turn that is not here is refused. So are columns of rows that change what an answer means; all others
# are the user's own notes.
KEYS: dict[str, Key] = {
    **_keys("role from content value", Use.READ, Use.IGNORED),
    **_keys("loss train training trainable masked weight", Use.SWITCH, Use.NEGATIVE),
    **_keys("reasoning_content reasoning thinking", Use.TEMPLATE, Use.TEMPLATE),
    **_keys("tool_calls function_call", Use.TEMPLATE, Use.REFUSED),
    **_keys("tool_call_id name", Use.TEMPLATE, Use.IGNORED),
    **_keys("tools functions", Use.REFUSED, Use.TEMPLATE),
    **_keys("system system_prompt", Use.REFUSED, Use.READ),
    **_keys("label kto_tag", Use.REFUSED, Use.NEGATIVE),
    **_keys("rejected rejected_response rejected_messages", Use.REFUSED, Use.REFUSED),
    **_keys("image images video videos audio audios", Use.REFUSED, Use.REFUSED),
    **_keys("documents chat_template_kwargs", Use.REFUSED, Use.REFUSED),
    **_keys("id uuid message_id parent_id index turn turn_id", Use.IGNORED, Use.IGNORED),
    **_keys("timestamp created_at create_time updated_at date", Use.IGNORED, Use.IGNORED),
    **_keys("language lang model source num_tokens", Use.IGNORED, Use.IGNORED),
}
SWITCHES = tuple(key for key, use in KEYS.items() if use.turn is Use.SWITCH)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
READ_COLUMNS = frozenset(key for key, use in KEYS.items() if use.row is not Use.IGNORED)
_WHY = {
    "rejected": "which would have to be unlearned, and nothing here does that",
    "image": "and only text is read",
    "video": "and only text is read",
    "audio": "and only text is read",
    "documents": "which the chat template would not be given",
    "chat_template_kwargs": "which the chat template would not be given",
    "tool_call": "which belongs into the assistant's turn",
    "function_call": "which belongs into the assistant's turn",
}


def is_given(value: Any) -> bool:
    """Whether a key holds something: tables fill with null, or with nothing, what a row does not have."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def check_turn_keys(name: str, turn: dict[str, Any]) -> None:
    """Refuse a turn with a key that would be passed over although it may say what is to be learned.

    Raises:
        RowProblem: there is one
    """
    for key, value in turn.items():
        use = KEYS[key].turn if key in KEYS else None
        if not is_given(value) or use not in (None, Use.REFUSED):
            continue
        if use is None:
            raise RowProblem(
                f"{name} has the key {key!r}, of which nobody knows what it says about the turn. Take it out, or give "
                f"it its usual name (docs/data.md lists all)."
            )
        raise RowProblem(f"{name} has {key}, {_reason(key, 'which belongs beside the conversation')}.")


def check_row_is_text(row: dict[str, Any], renamed: Collection[str]) -> None:
    """Refuse a row with a column that says that it is more than text and an answer.

    Args:
        row: with the names of the source
        renamed: columns which stand for another one

    Raises:
        RowProblem: there is such a column
    """
    for key in _columns(row, renamed, Use.REFUSED):
        if is_given(row[key]):
            remedy = "Leave the row out, or rename the column where it means something else"
            raise RowProblem(f"{key} is given, {_reason(key, 'which nothing here reads')}. {remedy}.")


def check_row_is_learned(row: dict[str, Any], renamed: Collection[str], has_classes: bool) -> None:
    """Refuse a row with a column that says that its answer is not to be learned.

    Args:
        row: with the names of the source
        renamed: columns which stand for another one
        has_classes: a number under `label` says what the text is about, not whether it is good

    Raises:
        RowProblem: there is such a column
    """
    for key in _columns(row, renamed, Use.NEGATIVE):
        value = row[key]
        if _says_no(key, value, has_classes):
            what = "so its answer is not to be learned" if key != "weight" else "but a row is learned with weight 1"
            raise RowProblem(
                f"{key} is {shown(value)}, {what}. Leave the row out, or rename the column if it means something else."
            )


def switch_of(name: str, turn: dict[str, Any]) -> tuple[str, bool] | None:
    """The key of a turn that says whether it is learned, and what it says; None where there is none.

    Raises:
        RowProblem: it is neither yes nor no, or two keys contradict each other
    """
    said: dict[str, bool] = {}
    for key in SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        # True == 1, but a weight of true and a loss of 0.5 are somebody else's notation
        if not isinstance(value, int | float) or value not in (0, 1) or (key == "weight" and isinstance(value, bool)):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise RowProblem(f"{name}.{key} is {shown(value)}, but it must be {allowed}.")
        said[key] = bool(value) != (key == "masked")
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} is {shown(turn[key])}" for key in said)
        raise RowProblem(f"{name} says both that it is learned and that it is not: {both}. Keep one of them.")
    return next(iter(said.items()), None)


def _columns(row: dict[str, Any], renamed: Collection[str], use: Use) -> list[str]:
    return [key for key in row if key in KEYS and KEYS[key].row is use and key not in renamed]


def _reason(key: str, otherwise: str) -> str:
    return next((why for start, why in _WHY.items() if key.startswith(start)), otherwise)


def _says_no(key: str, value: Any, has_classes: bool) -> bool:
    if key == "weight" and isinstance(value, int | float) and not isinstance(value, bool):
        return value != 1
    text = str(value).strip().casefold() if isinstance(value, str | bool | int | float) else ""  # CSV has words alone
    if key == "label" and has_classes:
        return text == "false"
    return text in ({"true", "1", "1.0"} if key == "masked" else {"false", "0", "0.0"})
