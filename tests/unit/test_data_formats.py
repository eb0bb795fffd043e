from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.formats import Conversation, RowParser
from dsmoelora.data.formats import read_conversations as read_source
from dsmoelora.errors import DataError

ALPACA = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MESSAGES = {"messages": [USER, ASSISTANT]}


def read_conversations(path: Path, **options: Any) -> Iterator[Conversation]:
    return read_source(DataSource(str(path)), **options)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_alpaca_rows_become_a_question_and_an_answer(tmp_path: Path) -> None:
    rows = [ALPACA, {"instruction": "Sing.", "input": "", "output": "La"}, {"instruction": "Sing.", "output": "La"}]
    conversations = list(read_conversations(write_lines(tmp_path / "a.jsonl", *rows)))
    assert [c.messages for c in conversations] == [
        [{"role": "user", "content": "Add.\n\n1 + 2"}, {"role": "assistant", "content": "3"}],
        [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La"}],
        [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La"}],
    ]
    assert [c.row for c in conversations] == [1, 2, 3]


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": ""}, USER, ASSISTANT, USER, ASSISTANT]
    (conversation,) = read_conversations(write_lines(tmp_path / "a.jsonl", {"messages": turns}))
    assert conversation.messages == turns


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_and_json_lines_read_alike(tmp_path: Path, indent: int | None) -> None:
    rows = [ALPACA, {**ALPACA, "output": "], [ {"}]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows, indent=indent) + "\n", encoding="utf-8-sig")  # with a byte order mark
    lines = write_lines(tmp_path / "b.json", *rows)
    assert [(c.messages, c.row) for c in read_conversations(array)] == [
        (c.messages, c.row) for c in read_conversations(lines)
    ]


def test_unknown_columns_are_ignored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {**ALPACA, "task": "sum", "score": 1.5})
    (conversation,) = read_conversations(path)
    assert conversation.messages[1]["content"] == "3"


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(ALPACA)}\n\n{json.dumps(ALPACA)}", encoding="utf-8")
    assert [c.row for c in read_conversations(path)] == [2, 4]


WRONG_ROWS = [
    ({"instruction": "x"}, "output is missing"),
    ({"instruction": "x", "output": ""}, "output is empty"),
    ({"instruction": "x", "output": " \n"}, "output is empty"),
    ({"instruction": "x", "output": None}, "output is null"),
    ({"instruction": "x", "output": 3}, "output is a number"),
    ({"instruction": "", "output": "y"}, "instruction is empty"),
    ({"instruction": ["x"], "output": "y"}, "instruction is a list"),
    ({"instruction": "x", "input": {}, "output": "y"}, "input is an object"),
    ({"instruction": "x", "input": 1, "output": "y"}, "input is a number"),
    ({"instruction": "x", "output": "\ud83d"}, "output holds half of a surrogate pair"),
    ({"output": "y"}, "instruction is missing"),
    ([1], "it is a list"),
    ("text", "it is a string"),
]

WRONG_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages is null"),
    ("Hi", "messages is 'Hi'"),
    ([], "no assistant turn"),
    ([USER], "no assistant turn"),
    ([ASSISTANT], "no user turn before"),
    ([USER, ASSISTANT, USER], "ends with role 'user'"),
    ([USER, "Hello"], "messages[1] is a string"),
    ([USER, {"role": "bot", "content": "x"}], "messages[1].role is 'bot'"),
    ([USER, {"role": ["user"], "content": "x"}], "messages[1].role is a list"),
    ([USER, {"content": "x"}], "messages[1].role is missing"),
    ([USER, {"role": "assistant"}], "messages[1].content is missing"),
    ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
    ([USER, {"role": "assistant", "content": "  "}], "messages[1].content is empty"),
    ([{"role": "user", "content": ""}, ASSISTANT], "messages[0].content is empty"),
    ([USER, {**ASSISTANT, "tool_calls": [{}]}], "messages[1].tool_calls[0].name is missing"),
    ([USER, {**ASSISTANT, "weight": 0}], "no turn of messages is to be learned"),
]


@pytest.mark.parametrize(("row", "problem"), WRONG_ROWS)
def test_wrong_alpaca_row_is_named_with_file_and_number(tmp_path: Path, row: Any, problem: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", ALPACA, ALPACA, row, ALPACA)
    with pytest.raises(DataError, match=re.escape(f"bad.jsonl, row 3: {problem}")):
        list(read_conversations(path))


@pytest.mark.parametrize(("turns", "problem"), WRONG_MESSAGES)
def test_wrong_messages_row_is_named_with_file_and_number(tmp_path: Path, turns: Any, problem: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([MESSAGES, {"messages": turns}]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert "bad.json, row 2: " in str(caught.value)
    assert problem in str(caught.value)


def test_first_row_without_an_answer_is_a_wrong_row_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: its columns are instruction, response, .*\(alpaca lacks output\)"):
        list(read_conversations(write_lines(tmp_path / "a.jsonl", {"instruction": "x", "response": "y"})))


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('{"instruction": "x", "output": "y"}\n{"instruction": "x", "out', 2),
        ('[{"instruction": "x", "output": "y"}, {"instruction": }]', 2),
        ('[{"instruction": "x", "output": "y"} {"instruction": "x", "output": "y"}]', 1),
        ('[{"instruction": "x", "output": "y"}', 1),
        ('[{"instruction": "x", "output": "y"},]', 2),
        ('[{"instruction": "x", "output": "y"}]\n{"instruction": "x", "output": "y"}', 1),
        ("[" * 100_000, 1),
        ('{"a": ' * 100_000, 1),
    ],
)
def test_invalid_json_is_named_with_file_and_row(tmp_path: Path, text: str, row: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.json, row {row}: invalid JSON"):
        list(read_conversations(path))


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ ] \n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.json holds no rows"):
        list(read_conversations(path))


def test_unknown_columns_name_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"row 1: its columns are question, reply,.* no known format\. .*messages.*fields: {"
    ):
        list(read_conversations(write_lines(tmp_path / "a.jsonl", {"question": "x", "reply": "y"})))


def test_missing_file_folder_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_conversations(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in '\.txt'.*\.json, \.jsonl"):
        list(read_conversations(tmp_path / "a.txt"))


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"instruction": "é", "output": "y"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_conversations(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", False),
        ("kto_tag", False),
        ("label", " False"),
        ("rejected", "Berlin."),
        ("images", ["a.png"]),
        ("videos", "v"),
        ("audios", [1]),
    ],
)
def test_rows_that_would_teach_something_else_are_refused_by_name(key: str, value: object) -> None:
    parser = RowParser(DataSource(path="rows.jsonl"), "rows.jsonl", "skip")
    row = {"prompt": "Capital of France?", "completion": "Paris."}
    assert parser(1, {**row, key: value}).problem.startswith(f"{key} ")
    assert not parser(2, {**row, key: None}).problem
    assert not parser(3, {**row, "label": True}).problem
