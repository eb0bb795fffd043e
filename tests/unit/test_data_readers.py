"""Sources: what a user may name, and what is said of one that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.formats import Conversation, read_conversations
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.readers import open_source
from dsmoelora.data.streams import SetStream
from dsmoelora.errors import DataError

ROW = {"instruction": "Hi", "output": "yo"}


def contents(path: Path | str, **options: Any) -> list[tuple[int, str, str]]:
    """(row, question, answer) of every row."""
    rows = read_conversations(DataSource(str(path), **options))
    return [(c.row, c.messages[-2]["content"], c.messages[-1]["content"]) for c in rows]


def message_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_conversations(DataSource(str(path), **options)))
    return str(caught.value)


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", "instruction,output\nHi,yo\nHo,ya\n"),
        ("excel.csv", "\ufeffinstruction;output\r\nHi;yo\r\nHo;ya\r\n"),
        ("tabs.tsv", "instruction\toutput\nHi\tyo\nHo\tya"),
        ("bars.csv", "instruction|output\nHi|yo\nHo|ya"),
        ("index.csv", ",instruction,output\n0,Hi,yo\n1,Ho,ya\n"),
        ("spaces.csv", " instruction , output\nHi,yo\nHo,ya\n"),
        ("quoted.csv", 'instruction,output\n"Hi","yo"\n"Ho","ya"\n'),
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, name: str, content: str) -> None:
    assert contents(file(tmp_path, name, content)) == [(2, "Hi", "yo"), (3, "Ho", "ya")]


def test_csv_rows_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    text = 'instruction,output\n"two\nlines",yo\n\nHo,"a ""b"", c"\n'
    assert contents(file(tmp_path, "a.csv", text)) == [(2, "two\nlines", "yo"), (5, "Ho", 'a "b", c')]


def test_huge_rows(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    assert contents(file(tmp_path, "a.csv", f"instruction,output\n{text},yo\n")) == [(2, text, "yo")]
    path = file(tmp_path, "a.jsonl", json.dumps({**ROW, "instruction": text}) + "\r\n")
    assert contents(path) == [(1, text, "yo")]


def test_nan_is_null(tmp_path: Path) -> None:
    assert contents(file(tmp_path, "a.jsonl", '{"instruction": "Hi", "input": NaN, "output": "yo"}')) == [
        (1, "Hi", "yo")
    ]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.csv", "", ["holds no rows"]),
        ("header.csv", "instruction,output\n", ["holds no rows"]),
        ("twice.csv", "instruction,output,output\na,b,c\n", ["header is instruction, output, output", "Rename one"]),
        ("wide.csv", "instruction,output\nHi,yo, man\n", ["row 2: it has 3 fields", "names 2", "double quotes"]),
        ("open.csv", 'instruction,output\nHi,"yo\nHo,ya\n', ["row 2: no valid CSV", "Mend the quotes"]),
        ("nohead.csv", "What?,That\nWhy?,So\n", ["columns are What?, That", "in CSV: in the first line"]),
        (
            "latin.csv",
            "instruction,output\nHi,gr\u00fcn".encode("latin-1"),
            ["row 2: it is not UTF-8", "Save the file as UTF-8"],
        ),
        ("latin.jsonl", b'{"instruction": "Hi", "output": "gr\xfcn"}', ["row 1: it is not UTF-8", "Save the file"]),
        ("wide.jsonl", json.dumps(ROW).encode("utf-16"), ["it is UTF-16", "Save it as UTF-8"]),
        ("fake.parquet", "PAR1", ["cannot be read as Parquet", "Write it anew"]),
        ("wrapped.json", json.dumps({"data": [ROW], "v": 1}), ["columns are data, v", "rows seem to be under 'data'"]),
        (
            "wrapped2.json",
            json.dumps({"data": [ROW]}, indent=1),
            ["one object over many lines", "save that list as a file of its own"],
        ),
        ("dolly.jsonl", '{"instruction": "a", "response": "b"}', ["alpaca lacks output", "fields: {instruction:"]),
        (
            "both.jsonl",
            '{"messages": [], "conversations": []}',
            [
                "row 1: its columns are messages, conversations, which fit several",
                "format: messages or format: sharegpt",
            ],
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, parts: list[str]) -> None:
    message = message_of(file(tmp_path, name, content))
    assert name in message
    for part in parts:
        assert part in message


def test_fields_say_what_the_columns_are_called(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", '{"question": "Hi", "reply": "yo"}')
    assert contents(path, fields={"instruction": "question", "output": "reply"}) == [(1, "Hi", "yo")]
    message = message_of(path, fields={"instruction": "question", "output": "answer"})
    assert "row 1: fields says that output is in column 'answer', but its columns are question, reply" in message


def test_a_forced_format_decides(tmp_path: Path) -> None:
    row = {**ROW, "choices": ["a", "b"], "answer": 1}
    path = file(tmp_path, "a.jsonl", json.dumps(row))
    assert contents(path) == [(1, "Hi", "yo")]  # the answer is written out: choices are but a remark
    assert contents(path, format="multiple_choice") == [(1, "Hi\n\nA. a\nB. b", "B")]
    assert "row 1: prompt is missing (found: instruction, output," in message_of(path, format="prompt_completion")


CHOICE = {"question": "q", "choices": ["a", "b"]}


@pytest.mark.parametrize(
    ("labels", "answer", "letter"),
    [
        ([1, 2, 3], 1, "A"),
        ([1, 2, 3], 3, "C"),
        ([1, 2, 3], 2.0, "B"),
        ([1.0, 2.0, 3.0], "2", "B"),
        (["1", "2", "3"], 1, "A"),
        (["a", "b", "c"], "b", "B"),
        (["a", "b", "c"], " C ", "C"),
        (["A", "B", "C"], "c", "C"),
        ([2, 0, 1], 0, "B"),
        (["w", "x", "a"], "A", "C"),
        (None, "a", "A"),
        (None, 1, "B"),
    ],
)
def test_an_answer_is_one_of_the_labels_where_there_are_any(
    tmp_path: Path, labels: list[Any] | None, answer: Any, letter: str
) -> None:
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": labels}, "answer": answer}
    assert contents(file(tmp_path, "a.jsonl", json.dumps(row))) == [(1, "q\n\nA. x\nB. y\nC. z", letter)]


def labelled(labels: Any, answer: Any) -> dict[str, Any]:
    return {"question": "q", "choices": {"text": ["x", "y"], "label": labels}, "answer": answer}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**CHOICE, "answer": 2}, "answer is 2, but it must be one of 0 to 1 (counted from 0) or one of A, B"),
        ({**CHOICE, "answer": -1}, "answer is -1"),
        ({**CHOICE, "answer": True}, "answer is True"),
        ({**CHOICE, "answer": "C"}, "answer is 'C'"),
        ({**CHOICE, "answer": None}, "answer is null"),
        (labelled([1, 2], 0), "answer is 0, but it must be one of 1, 2, for"),
        (labelled([1, 2], "0"), "answer is '0', but it must be one of 1, 2, for"),
        (labelled(["A", "B"], 1), "answer is 1, but it must be one of A, B, for"),
        (labelled(["x", "None"], None), "answer is null"),
        (labelled(["A"], "A"), "choices.label is A, but it must have another label for each of the 2 entries"),
        (labelled(["A", "a"], "a"), "choices.label is A, a, but it must have another label for each of the 2"),
        (labelled("A and B", "A"), "choices.label is 'A and B', but it must be a list"),
        ({**CHOICE, "choices": ["a"], "answer": 0}, "choices has 1 entries"),
        ({**CHOICE, "choices": ["a", ""], "answer": 0}, "choices[1] is empty"),
        ({**CHOICE, "choices": ["a", 1], "answer": 0}, "choices[1] is a number"),
        ({**CHOICE, "choices": "['a' 'b']", "answer": 0}, "choices has 1 entries"),  # as numpy prints an array
        ({**CHOICE, "choices": "a or b", "answer": 0}, "choices is 'a or b', but it must be a list"),
        ({**ROW, "history": [["a"]]}, "history[0] is a list, but it must be a list of a question and its answer"),
        ({**ROW, "history": [["a", ""]]}, "history[0][1] is empty"),
        ({**ROW, "system": 3}, "system is a number"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "prompt is a list"),
        ({"text": ""}, "text is empty"),
        ({"conversations": []}, "conversations has no assistant turn"),
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            "conversations[0].from is 'robot', but it must be one of",
        ),
        (
            {"system": "a", "messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]},
            "system is given, but the conversation has a system message of its own",
        ),
    ],
)
def test_wrong_rows_of_the_other_formats(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = file(tmp_path, "bad.jsonl", json.dumps(row))
    assert f"bad.jsonl, row 1: {problem}" in message_of(path)


def skipped(path: Path, **options: Any) -> list[Conversation]:
    return list(read_conversations(DataSource(str(path), **options), "skip"))


def test_wrong_rows_are_skipped_when_the_user_says_so(tmp_path: Path) -> None:
    lines = ["null", json.dumps(ROW), '{"broken', json.dumps({"instruction": "x"}), json.dumps(ROW)]
    rows = skipped(file(tmp_path, "a.jsonl", "\n".join(lines)))
    assert [bool(row.problem) for row in rows] == [True, False, True, True, False]
    assert [row.row for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3].problem.startswith("output is missing (found: instruction)")


def test_an_unknown_format_is_an_error_even_then(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 1}')
    with pytest.raises(DataError, match="row 1: its columns are a, which fit no known format"):
        skipped(path)


# Values that Python cannot hold

HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{0}\n{"instruction": "a", "output": "b", "id": HUGE}\n{0}'),
        ("a.json", '[{0}, {"instruction": "a", "output": "b", "meta": [{"n": -HUGE}]}, {0}]'),
        ("b.json", '[{0},\n{"instruction": "gr\xfcn", "output": "b"},\n{0}]'),
        ("b.jsonl", '{0}\n{"instruction": "gr\xfcn", "output": "b"}\n{0}'),
        ("b.csv", "instruction,output\nHi,yo\ngr\xfcn,b\nHi,yo"),
    ],
)
def test_a_value_that_cannot_be_read_is_a_wrong_row(tmp_path: Path, name: str, text: str) -> None:
    content = text.replace("{0}", json.dumps(ROW)).replace("HUGE", HUGE)
    path = file(tmp_path, name, content.encode("latin-1"))
    assert [bool(row.problem) for row in skipped(path)] == [False, True, False]
    message = message_of(path)
    assert ("row 3: " if name.endswith("csv") else "row 2: ") in message
    assert "5,000 digits" in message or "it is not UTF-8 text" in message


def tables(folder: Path, table: pyarrow.Table) -> list[Path]:
    """The same as Parquet file and as saved folder."""
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    datasets.Dataset(table).save_to_disk(folder / "saved")
    return [folder / "a.parquet", folder / "saved"]


def broken_text(*texts: bytes) -> pyarrow.Array:
    """A column of text with bytes that are none."""
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


FAR = pyarrow.array([0, 2**60, 0], pyarrow.timestamp("ms"))  # beyond the year 9999


def test_a_cell_that_cannot_be_read_is_a_wrong_row(tmp_path: Path) -> None:
    columns = {"instruction": broken_text(b"Hi", b"gr\xfcn", b"Ho"), "output": pyarrow.array(["a", "b", "c"])}
    for path in tables(tmp_path, pyarrow.table(columns)):
        rows = skipped(path)
        assert [row.row for row in rows if not row.problem] == [1, 3]
        assert rows[1].problem.startswith("instruction cannot be read (") and "row 2: instruction" in message_of(path)
        stream = SetStream(open_source(DataSource(str(path)), streaming=True))
        contents_of = [stream.next() for _ in range(3)]
        assert [isinstance(row[1], RowProblem) for row in contents_of if row] == [False, True, False]


@pytest.mark.parametrize("bad", [broken_text(b"x", b"\xff", b"y"), FAR])
def test_columns_that_nobody_reads_are_not_read(tmp_path: Path, bad: pyarrow.Array) -> None:
    texts = pyarrow.array(["Hi", "Hi", "Hi"])
    columns = {"instruction": texts, "output": texts, "text": bad, "note": bad, "reply": bad}
    for path in tables(tmp_path, pyarrow.table(columns)):
        assert len(contents(path)) == 3
        if bad is not FAR:
            renamed = skipped(path, fields={"output": "note"})
            assert [bool(row.problem) for row in renamed] == [False, True, False]  # now it is read


def test_a_read_column_of_dates_beyond_python(tmp_path: Path) -> None:
    texts = pyarrow.array(["Hi", "Hi", "Hi"])
    for path in tables(tmp_path, pyarrow.table({"instruction": texts, "output": texts, "label": FAR})):
        assert [bool(row.problem) for row in skipped(path)] == [False, True, False]


def test_an_unknown_format_names_the_columns_that_were_not_read(tmp_path: Path) -> None:
    table = pyarrow.table({"left": ["a"], "right": [[{"x": 1}]]})
    for path in tables(tmp_path, table):
        assert "its columns are left, right, which fit no known format" in message_of(path)


def test_a_table_with_a_name_twice(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "its columns are text, text, but no name may come twice" in message_of(tmp_path / "a.parquet")


# Folders and the hub


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{**ROW, "output": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved", split="test") == [(1, "Hi", "test")]
    for options in ({}, {"split": "dev"}):
        message = message_of(tmp_path / "saved", **options)
        assert "has the splits train, test, but its split is" in message and "split: train}" in message
    datasets.DatasetDict({"only": parts["train"]}).save_to_disk(tmp_path / "single")
    assert contents(tmp_path / "single") == [(1, "Hi", "train")]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_that_a_saved_folder_does_not_have(tmp_path: Path, streaming: bool) -> None:
    rows = datasets.Dataset.from_list([ROW])
    rows.save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_list([ROW], split=datasets.Split.TRAIN).save_to_disk(tmp_path / "train")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "parts")

    def refusal(name: str, **options: str) -> str:
        with pytest.raises(DataError) as caught:
            open_source(DataSource(str(tmp_path / name), **options), streaming)
        return str(caught.value)

    assert open_source(DataSource(str(tmp_path / "train"), split="train"), streaming).name.endswith("train (train)")
    wrong = "saved folder with the split 'train' alone, but its split is 'test'. Drop the split, or name"
    assert wrong in refusal("train", split="test")
    assert "saved folder with a set without a split, but its split is 'train'" in refusal("plain", split="train")
    for name in ("plain", "train", "parts"):
        assert "is a saved folder, but its subset is 'main'" in refusal(name, subset="main")


def test_other_folders(tmp_path: Path) -> None:
    file(tmp_path, "rows.jsonl", json.dumps(ROW))
    assert "none that save_to_disk" in message_of(tmp_path) and "rows.jsonl" in message_of(tmp_path)
    file(tmp_path, "dataset_info.json", "{}")
    assert "cannot be loaded as a saved dataset" in message_of(tmp_path)


def test_a_file_has_no_split(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps(ROW))
    assert "is a single file, but its split is 'train'. Drop the split." in message_of(path, split="train")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, datasets.DatasetDict]:
    """A hub with a single dataset, `owner/set`, which has the configuration `main`."""
    stored = {"owner/set": datasets.DatasetDict(train=datasets.Dataset.from_list([ROW, ROW]))}

    def load_dataset(path: str, name: str | None, split: str | None, streaming: bool) -> Any:
        if name not in (None, "main"):
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['main']")
        found = {part: rows.to_iterable_dataset() if streaming else rows for part, rows in stored[path].items()}
        return found if split is None else found[split]

    def dataset_info(self: object, name: str, timeout: float) -> None:
        if name not in stored:
            raise ConnectionError("404: Repository Not Found\nfor url ...")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return stored


def test_hub_names(hub: object) -> None:
    assert contents("owner/set") == contents("owner/set", split="train", subset="main")
    assert contents("owner/set") == [(1, "Hi", "yo"), (2, "Hi", "yo")]
    assert open_source(DataSource("owner/set", split="train")).name == "owner/set (train)"


def test_a_streamed_hub_name_is_not_downloaded(hub: object) -> None:
    opened = open_source(DataSource("owner/set", subset="main"), streaming=True)
    assert isinstance(opened.dataset, datasets.IterableDataset) and opened.num_bytes == 0
    assert [number for number, _ in opened.read()] == [1, 2]


def test_a_streamed_row_that_python_cannot_hold_is_named(hub: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield ROW
        raise OverflowError("date value out of range")

    streamed = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    found = open_source(DataSource("owner/set"), streaming=True).read()
    assert next(iter(found))[0] == 1
    with pytest.raises(DataError, match=r"owner/set, row 2 cannot be streamed \(date value .*streaming: false"):
        list(open_source(DataSource("owner/set"), streaming=True).read())


def test_hub_names_that_are_wrong(hub: object) -> None:
    message = message_of("owner/sets")
    assert "owner/sets is no local file or folder" in message and "(404: Repository Not Found)" in message
    assert "BuilderConfig 'other' not found" in message_of("owner/set", subset="other")


@pytest.mark.parametrize("path", ["data/train.jsonl", "./set", "/no/set", "a/b/c", "train.csv", "tests/set"])
def test_paths_are_not_looked_for_on_the_hub(hub: object, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert "does not exist. Check the path" in message_of(path)
