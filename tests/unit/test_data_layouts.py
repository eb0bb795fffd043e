"""Files whose rows are laid out in another way: read where it is clear, else called what they are, with a remedy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.formats import read_conversations
from dsmoelora.data.readers import open_source
from dsmoelora.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yo"}]
ROWS = [{"instruction": "Hi", "output": "12"}, {"instruction": "Ho", "output": "2024-01-02"}]


def contents(path: Path, **options: Any) -> list[tuple[int, str, str]]:
    rows = read_conversations(DataSource(str(path), **options))
    return [(c.row, c.messages[-2]["content"], c.messages[-1]["content"]) for c in rows]


def message_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_conversations(DataSource(str(path), **options)))
    return str(caught.value)


def file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("column", ["conversation", "dialog", "dialogue"])
@pytest.mark.parametrize("turns", [TURNS, SHARED])
@pytest.mark.parametrize("options", [{}, {"format": "messages"}])
def test_other_names_for_messages(tmp_path: Path, column: str, turns: Any, options: dict[str, str]) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({column: turns, "id": 1}))
    assert contents(path, **options) == [(1, "Hi", "yo")]
    path = file(tmp_path, "b.jsonl", json.dumps({column: ["Hi", "yo"]}))
    assert f"row 1: {column}[0] is a string, but it must be an object" in message_of(path)


def test_several_names_for_messages(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({"dialog": TURNS, "conversation": TURNS}))
    message = message_of(path)
    assert "conversation and dialog may each be the conversation" in message
    assert contents(path, fields=fields_of(message)) == [(1, "Hi", "yo")]


def fields_of(message: str) -> dict[str, str]:
    """The remedy `fields: {a: b}` of a message."""
    key, _, value = re.findall(r"fields: \{(.+?)\}", message)[-1].partition(": ")
    return {key: value}


def test_a_conversation_under_another_name(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({"id": 3, "exchange": TURNS}))
    message = message_of(path)
    assert "its columns are id, exchange, which fit no known format" in message
    assert "The conversation seems to be under 'exchange'" in message
    assert contents(path, fields=fields_of(message)) == [(1, "Hi", "yo")]


@pytest.mark.parametrize("turns", [TURNS, SHARED])
@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("a.jsonl", "{0}\n{0}\n", [1, 2]),
        ("a.jsonl", "{0}\r\r{0}\r", [1, 3]),
        ("a.json", "{0}\n\n{0}", [1, 3]),
        ("a.jsonl", "{0}", [1]),
        ("a.json", "[{0}, {0}]", [1, 2]),
        ("a.json", "[\n{0},\n{0}\n]", [1, 2]),
    ],
)
@pytest.mark.parametrize("format", ["auto", "messages", "sharegpt"])
def test_bare_lists_are_conversations(
    tmp_path: Path, name: str, text: str, numbers: list[int], turns: Any, format: str
) -> None:
    path = file(tmp_path, name, text.replace("{0}", json.dumps(turns)))
    assert contents(path, format=format) == [(number, "Hi", "yo") for number in numbers]


def test_lines_of_bare_lists_can_be_streamed(tmp_path: Path) -> None:
    path = file(tmp_path, "a.json", 3 * (json.dumps(TURNS) + "\n"))
    assert len(list(open_source(DataSource(str(path)), streaming=True).read())) == 3


@pytest.mark.parametrize("text", ["\n".join(map(json.dumps, TURNS)), json.dumps(TURNS, indent=1)])
def test_single_turns_are_no_rows(tmp_path: Path, text: str) -> None:
    message = message_of(file(tmp_path, "a.json", text))
    assert "row 1: " in message and "it is a single turn of a conversation" in message
    turns = json.dumps({"messages": TURNS})  # the remedy
    assert contents(file(tmp_path, "b.json", turns)) == [(1, "Hi", "yo")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines", "first"),
    [
        ("a.jsonl", [json.dumps(row) for row in ROWS], 1),
        ("a.csv", ["instruction,output", "Hi,12", "Ho,2024-01-02"], 2),
        ("a.csv", ["sep=;", "instruction;output", "Hi;12", "Ho;2024-01-02"], 3),
        ("a.csv", ["\ufeffsep=\t", "instruction\toutput", "Hi\t12", "Ho\t2024-01-02"], 3),
        ("a.csv", ['"sep=|"', "instruction|output", "Hi|12", "Ho|2024-01-02"], 3),
    ],
)
def test_line_ends_and_separators(tmp_path: Path, name: str, lines: list[str], first: int, end: str) -> None:
    expected = [(first + i, row["instruction"], row["output"]) for i, row in enumerate(ROWS)]
    assert contents(file(tmp_path, name, end.join(lines))) == expected
    assert contents(file(tmp_path, name, end.join([*lines, ""]))) == expected


def run_remedy(message: str, folder: Path) -> Path:
    """Runs the command of a message as a shell would, in `folder`."""
    command = shlex.split(message[message.index("python -c ") :])
    done = subprocess.run([sys.executable, *command[1:3]], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "rows.jsonl"


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("options", [{}, {"format": "alpaca"}])
def test_pandas_tables(tmp_path: Path, orient: Any, indent: int | None, options: dict[str, str]) -> None:
    path = tmp_path / "it's a.json"
    pandas.DataFrame(ROWS).to_json(path, orient=orient, indent=indent)
    message = message_of(path, **options)
    assert f"it is a whole table, as pandas writes it with orient='{orient}'" in message
    if indent is None and not options:
        rows = run_remedy(message, tmp_path)
        assert contents(rows) == [(1, "Hi", "12"), (2, "Ho", "2024-01-02")]


@pytest.mark.parametrize("orient", ["columns", "index"])
def test_pandas_tables_with_names_for_rows(tmp_path: Path, orient: Any) -> None:
    path = tmp_path / "a.json"
    pandas.DataFrame(ROWS, index=["x", "y"]).to_json(path, orient=orient)
    assert f"orient='{orient}'" in message_of(path)


def test_pandas_records_are_rows(tmp_path: Path) -> None:
    pandas.DataFrame(ROWS).to_json(tmp_path / "a.json", orient="records")
    assert [row[1:] for row in contents(tmp_path / "a.json")] == [("Hi", "12"), ("Ho", "2024-01-02")]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("rows", [ROWS, [TURNS, TURNS]])
def test_rows_under_a_key(tmp_path: Path, indent: int | None, rows: list[Any]) -> None:
    message = message_of(file(tmp_path, "a.json", json.dumps({"v": 1, "data": rows}, indent=indent)))
    assert "The rows seem to be under 'data': save that list as a file of its own" in message
    assert len(contents(file(tmp_path, "b.json", json.dumps(rows)))) == 2


def test_one_conversation_over_many_lines(tmp_path: Path) -> None:
    message = message_of(file(tmp_path, "a.json", json.dumps({"messages": TURNS}, indent=1)))
    assert "one object over many lines" in message and message.endswith("Put it on one line.")
    assert contents(file(tmp_path, "b.json", json.dumps({"messages": TURNS}))) == [(1, "Hi", "yo")]


def test_a_row_with_a_mistake_is_no_table(tmp_path: Path) -> None:
    row = {"instruction": "Hi", "output": "", "sources": [{"url": "x"}]}
    assert "row 1: output is empty" in message_of(file(tmp_path, "a.jsonl", json.dumps(row)))


@pytest.mark.parametrize("row", [{"chosen": TURNS, "rejected": TURNS}, {"prompt": "a", "chosen": "b", "rejected": "c"}])
def test_preferences_are_called_what_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "row 1: rejected is given, which would have to be unlearned" in message_of(
        file(tmp_path, "a.jsonl", json.dumps(row))
    )
