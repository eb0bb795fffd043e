"""Keys of turns and rows: what is learned, what the chat template gets, what is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoelora.config import DataSource
from dsmoelora.data.columns import COLUMNS
from dsmoelora.data.formats import Conversation, RowParser
from dsmoelora.data.keys import KEYS, Use

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ALPACA = {"instruction": "Hi", "output": "Hello"}


def parsed(row: Any, **options: Any) -> Conversation:
    return RowParser(DataSource("rows.jsonl", **options), "rows.jsonl", "skip")(1, row)


def chat(*turns: dict[str, Any], **columns: Any) -> Conversation:
    return parsed({"messages": [*turns], **columns})


def test_the_page_says_of_every_key_what_the_code_does() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    uses = {use.value for use in Use}
    said = {key: (turn, row) for keys, turn, row in rows if {turn, row} <= uses for key in re.findall(r"`(\w+)`", keys)}
    assert said == {key: (use.turn.value, use.row.value) for key, use in KEYS.items()}


@pytest.mark.parametrize("key", [key for key, use in KEYS.items() if use.turn is Use.REFUSED])
def test_refused_keys_of_a_turn_are_named(key: str) -> None:
    assert f"messages[1] has {key}, " in chat(USER, {**ASSISTANT, key: ["x"]}).problem


@pytest.mark.parametrize("key", [key for key, use in KEYS.items() if use.row is Use.REFUSED])
@pytest.mark.parametrize("row", [ALPACA, {"messages": [USER, ASSISTANT]}, {"text": "Once"}])
def test_refused_columns_are_named(row: dict[str, Any], key: str) -> None:
    assert f"{key} is given, " in parsed({**row, key: ["x"]}).problem
    for nothing in (None, "", [], {}):
        assert parsed({**row, key: nothing}).problem == ""


@pytest.mark.parametrize("key", [key for key, use in KEYS.items() if use.turn is Use.IGNORED])
def test_ignored_keys_reach_nobody(key: str) -> None:
    assert chat(USER, {**ASSISTANT, key: 1}).messages == [USER, ASSISTANT]


@pytest.mark.parametrize("key", ["Loss", "learn", "mask", "learns", "loss_scale", "text", "train_detail"])
def test_an_unknown_key_of_a_turn_is_refused_by_name(key: str) -> None:
    assert f"messages[1] has the key {key!r}" in chat(USER, {**ASSISTANT, key: False}).problem
    assert chat(USER, {**ASSISTANT, key: None}).problem == ""


YES = [("loss", True), ("train", 1), ("training", True), ("trainable", True), ("masked", False), ("weight", 1)]
NO = [("loss", False), ("train", 0), ("training", False), ("trainable", False), ("masked", True), ("weight", 0)]


@pytest.mark.parametrize(("key", "value"), NO)
def test_a_turn_says_that_it_is_not_learned(key: str, value: Any) -> None:
    found = chat(USER, {**ASSISTANT, key: value}, USER, ASSISTANT)
    assert found.learned == (3,) and found.messages == [USER, ASSISTANT, USER, ASSISTANT]
    last = chat({"role": "system", "content": "x"}, USER, ASSISTANT, USER, {**ASSISTANT, key: value})
    assert last.learned == (2,)
    assert "no turn of messages is to be learned" in chat(USER, {**ASSISTANT, key: value}).problem


def test_a_system_column_moves_what_is_learned() -> None:
    found = chat(USER, {**ASSISTANT, "loss": False}, USER, ASSISTANT, system="Be brief.")
    assert found.learned == (4,) and found.messages[4] == ASSISTANT


@pytest.mark.parametrize(("key", "value"), YES)
def test_a_turn_says_that_it_is_learned(key: str, value: Any) -> None:
    assert chat(USER, {**ASSISTANT, key: value}).learned is None
    assert f"messages[0].{key} is " in chat({**USER, key: value}, ASSISTANT).problem
    assert "only the assistant" in chat({**USER, key: value}, ASSISTANT).problem


@pytest.mark.parametrize(("key", "value"), NO)
def test_a_user_that_is_not_learned_is_what_users_are(key: str, value: Any) -> None:
    assert chat({**USER, key: value}, ASSISTANT).learned is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0.5), ("weight", True), ("weight", 2), ("weight", "1"), ("loss", 0.3), ("train", "yes"), ("loss", [])],
)
def test_a_switch_is_yes_or_no(key: str, value: Any) -> None:
    assert f"messages[1].{key} is " in chat(USER, {**ASSISTANT, key: value}).problem


@pytest.mark.parametrize(("yes", "no"), [(y, n) for y, n in itertools.product(YES, NO) if y[0] != n[0]])
def test_switches_that_contradict_each_other(yes: tuple[str, Any], no: tuple[str, Any]) -> None:
    problem = chat(USER, {**ASSISTANT, **dict([yes, no])}).problem
    assert "both that it is learned and that it is not" in problem and yes[0] in problem and no[0] in problem


@pytest.mark.parametrize("value", [False, "false", "False", 0, "0", 0.0])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_bad_answer_is_not_learned(key: str, value: Any) -> None:
    assert f"{key} is " in parsed({"prompt": "a", "completion": "b", key: value}).problem
    assert f"{key} is " in parsed({"messages": [USER, ASSISTANT], key: value}).problem


@pytest.mark.parametrize("value", [True, "true", 1, 3, "good", None])
def test_other_labels_say_nothing(value: Any) -> None:
    assert parsed({"prompt": "a", "completion": "b", "label": value}).problem == ""


def test_a_label_may_be_a_class_or_the_answer() -> None:
    assert parsed({"text": "Once", "label": 0}).problem == ""
    choice = {"question": "q", "choices": ["x", "y"], "label": 0}
    assert parsed(choice, fields={"answer": "label"}).messages[-1]["content"] == "A"


@pytest.mark.parametrize(("key", "value"), [*NO, ("weight", 0.5)])
def test_a_row_that_is_not_to_be_learned(key: str, value: Any) -> None:
    assert f"{key} is " in parsed({**ALPACA, key: value}).problem


@pytest.mark.parametrize(("key", "value"), [*YES, ("loss", 1.37), ("train", "split")])
def test_columns_that_say_nothing_against_learning(key: str, value: Any) -> None:
    assert parsed({**ALPACA, key: value}).problem == ""


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_reach_the_message(key: str) -> None:
    assert chat(USER, {**ASSISTANT, key: "hm"}).messages[1] == {**ASSISTANT, key: "hm"}
    assert parsed({**ALPACA, key: "hm"}).messages[1] == {**ASSISTANT, key: "hm"}
    assert f"it has {key} beside messages" in chat(USER, ASSISTANT, **{key: "hm"}).problem
    assert f"it has {key}, which is for the chat template" in parsed({"text": "Once", key: "hm"}).problem
    assert f"has {key}, which belongs to the assistant" in chat({**USER, key: "hm"}, ASSISTANT).problem
    assert f"messages[1].{key} is a number" in chat(USER, {**ASSISTANT, key: 3}).problem


def test_thoughts_under_two_keys_are_the_same() -> None:
    assert chat(USER, {**ASSISTANT, "reasoning": "hm", "thinking": "hm"}).problem == ""
    assert (
        "different thoughts as reasoning and thinking"
        in chat(USER, {**ASSISTANT, "reasoning": "hm", "thinking": "ah"}).problem
    )


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio", "input_audio", "tool_use", "thinking"])
def test_parts_that_are_no_text_are_refused(kind: str) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": kind, kind: "x"}]
    assert f"messages[0].content[1].type is '{kind}'" in chat({"role": "user", "content": parts}, ASSISTANT).problem


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    assert chat({"role": "user", "content": parts}, ASSISTANT).messages[0]["content"] == "ab"


def test_keys_of_turns_that_are_written_as_text(tmp_path: Path) -> None:
    turns = json.dumps([USER, {**ASSISTANT, "loss": False}, USER, ASSISTANT])
    assert parsed({"messages": turns}).learned == (3,)


NAMES = st.sampled_from([*KEYS, *(name for each in COLUMNS.values() for name in each.required | each.optional), "x"])
ATOMS = (
    st.sampled_from([None, True, False, 0, 1, 0.5, "", " ", "user", "assistant", "tool", "function_call", "text", "[]"])
    | st.text(max_size=3)
    | st.integers()
    | st.floats()
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)
TURNS = st.dictionaries(NAMES, VALUES, max_size=3).map(lambda extra: {**ASSISTANT, **extra})
CHATS = st.lists(TURNS, max_size=3).map(lambda turns: {"messages": [USER, *turns, ASSISTANT]})
FITTING = [ALPACA, {"text": "Once"}, {"question": "q", "choices": ["a", "b"], "answer": "a"}]


@settings(max_examples=500, deadline=None)
@given(
    VALUES | CHATS | st.tuples(st.sampled_from(FITTING), st.dictionaries(NAMES, VALUES)).map(lambda p: {**p[0], **p[1]})
)
def test_any_row_is_read_or_refused(row: Any) -> None:
    """No value gives anything but a conversation that a template can be handed, or a sentence."""
    found = parsed(row)
    if found.problem:
        assert not found.messages and not found.text
        return
    json.dumps([found.messages, found.tools], allow_nan=True).encode("utf-8")
    learned = range(len(found.messages)) if found.learned is None else found.learned
    assert found.text or any(found.messages[i]["role"] == "assistant" for i in learned)
    for message in found.messages:
        assert {"role", "content"} <= message.keys() and isinstance(message["content"], str)
        assert all(KEYS[key].turn in (Use.READ, Use.TEMPLATE) for key in message)
