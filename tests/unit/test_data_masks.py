"""Ten rows of every format, with what is learned of them written out by hand between ⟦ and ⟧."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data import InstructionDataset, load_instructions
from dsmoelora.data.formats import PARSERS
from tests.helpers import tiny_tokenizer

SAMPLES = Path(__file__).parent.parent / "samples"

# <s> and <e> stand for <|im_start|> and <|im_end|>; one token a byte, one for each of the two.
EXPECTED = {
    "alpaca": [
        "<s>user\nAdd.\n\n1 + 2<e>\n<s>assistant\n⟦3<e>⟧\n",
        "<s>user\nSing.<e>\n<s>assistant\n⟦La<e>⟧\n",
        "<s>user\nSing.<e>\n<s>assistant\n⟦La la<e>⟧\n",
        "<s>user\nName it.<e>\n<s>assistant\n⟦Bo<e>⟧\n",
        "<s>user\nGreet.\n\nZoë<e>\n<s>assistant\n⟦Grüß dich<e>⟧\n",
        "<s>user\nRhyme.<e>\n<s>assistant\n⟦cat\nhat<e>⟧\n",
        "<s>user\nA?<e>\n<s>assistant\n⟦B<e>⟧\n<s>user\nGo on.<e>\n<s>assistant\n⟦C<e>⟧\n",
        "<s>system\nYou are Bo.<e>\n<s>user\nBe kind.<e>\n<s>assistant\n⟦Hi<e>⟧\n",
        "<s>user\nCount.<e>\n<s>assistant\n⟦1, 2<e>⟧\n",
        "<s>user\nSay ok.<e>\n<s>assistant\n⟦[ok]<e>⟧\n",
    ],
    "messages": [
        "<s>user\nHi<e>\n<s>assistant\n⟦Hello<e>⟧\n",
        "<s>system\nBe brief.<e>\n<s>user\nHi<e>\n<s>assistant\n⟦Yo<e>⟧\n",
        "<s>system\n<e>\n<s>user\nHi<e>\n<s>assistant\n⟦Yo<e>⟧\n",
        "<s>user\na<e>\n<s>assistant\n⟦b<e>⟧\n<s>user\nc<e>\n<s>assistant\n⟦d<e>⟧\n",
        "<s>user\na<e>\n<s>user\nb<e>\n<s>assistant\n⟦c<e>⟧\n",
        "<s>user\né<e>\n<s>assistant\n⟦日本<e>⟧\n",
        "<s>user\nxy<e>\n<s>assistant\n⟦z<e>⟧\n",
        "<s>user\nsame<e>\n<s>assistant\n⟦same<e>⟧\n",
        "<s>system\nD<e>\n<s>user\nu<e>\n<s>assistant\n⟦v<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦line\nline<e>⟧\n",
    ],
    "sharegpt": [
        "<s>user\nHi<e>\n<s>assistant\n⟦Hello<e>⟧\n",
        "<s>system\nBe brief.<e>\n<s>user\nHi<e>\n<s>assistant\n⟦Yo<e>⟧\n",
        "<s>user\na<e>\n<s>assistant\n⟦b<e>⟧\n<s>user\nc<e>\n<s>assistant\n⟦d<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>system\nS<e>\n<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nü<e>\n<s>assistant\n⟦ß<e>⟧\n",
        "<s>user\na<e>\n<s>assistant\n⟦b<e>⟧\n<s>assistant\n⟦c<e>⟧\n",
        "<s>system\n<e>\n<s>user\nq<e>\n<s>assistant\n⟦1\n2<e>⟧\n",
    ],
    "prompt_completion": [
        "<s>user\n2+2=<e>\n<s>assistant\n⟦4<e>⟧\n",
        "<s>user\nHi<e>\n<s>assistant\n⟦Hello<e>⟧\n",
        "<s>user\nHi\n<e>\n<s>assistant\n⟦Hello<e>⟧\n",
        "<s>user\né<e>\n<s>assistant\n⟦è<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a b c<e>⟧\n",
        "<s>system\nS<e>\n<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦a<e>⟧\n",
        "<s>user\nq<e>\n<s>assistant\n⟦q<e>⟧\n",
        '<s>user\nq<e>\n<s>assistant\n⟦{"a": 1}<e>⟧\n',
    ],
    "multiple_choice": [
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦B<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦A<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦B<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦A<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦B<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦A<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue\nC. green<e>\n<s>assistant\n⟦C<e>⟧\n",
        "<s>user\nPick.\n\nSky?\n\nA. é\nB. ü<e>\n<s>assistant\n⟦B<e>⟧\n",
        "<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦B<e>⟧\n",
        "<s>system\nS<e>\n<s>user\nSky?\n\nA. red\nB. blue<e>\n<s>assistant\n⟦B<e>⟧\n",
    ],
    # the first token has nothing before it that could predict it
    "text": [
        "a⟦bc<e>⟧",
        "a⟦<e>⟧",
        "t⟦wo\nlines<e>⟧",
        "n⟦é<e>⟧",
        "=⟦日本<e>⟧",
        " ⟦spaces <e>⟧",
        "e⟦nds<e>⟧",
        "<e>⟦ inside<e>⟧",
        '{⟦"a": 1}<e>⟧',
        "x⟦<e>⟧",
    ],
}


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tiny_tokenizer(tmp_path / "tokenizer")


def ids_and_labels(tokenizer: PreTrainedTokenizerBase, marked: str) -> tuple[list[int], list[int]]:
    """The tokens of a text without its marks, and the same with -100 outside of them."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in marked.replace("⟦", "|⟦").replace("⟧", "|").split("|"):
        text = piece.removeprefix("⟦").replace("<s>", "<|im_start|>").replace("<e>", "<|im_end|>")
        found = tokenizer(text).input_ids
        ids += found
        labels += found if piece.startswith("⟦") else [-100] * len(found)
    return ids, labels


def check(dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    assert len(dataset) == 10
    for i, marked in enumerate(EXPECTED[name]):
        assert dataset.sample(i) == ids_and_labels(tokenizer, marked), (name, i)


def test_there_is_a_sample_file_for_every_format() -> None:
    assert set(EXPECTED) == set(PARSERS) == {file.stem for file in SAMPLES.glob("*.jsonl")}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("given", ["auto", "forced"])
def test_masks(tokenizer: PreTrainedTokenizerBase, name: str, given: str) -> None:
    source = DataSource(str(SAMPLES / f"{name}.jsonl"), format=name if given == "forced" else "auto")
    check(load_instructions([source], "data.train", tokenizer, 200), tokenizer, name)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def as_csv(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    """Lists as JSON text, what a row lacks as an empty field; with the byte order mark and line ends of Excel."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(
            {column: json.dumps(value) if isinstance(value, list | dict) else value for column, value in row.items()}
            for row in rows
        )
    return DataSource(str(path))


@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt", "prompt_completion", "text"])
def test_csv_gives_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    source = as_csv(tmp_path / "a.csv", rows_of(name))
    check(load_instructions([source], "data.train", tokenizer, 200), tokenizer, name)


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "prompt_completion", "text"])
def test_parquet_and_saved_folders_give_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    given = rows_of(name)
    columns = dict.fromkeys(column for row in given for column in row)
    # Every row gets every column, and every nested object every field: what a row lacks is null.
    table = pyarrow.Table.from_pylist([{**dict.fromkeys(columns), **row} for row in given])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = datasets.Dataset(table)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"one": rows.select([0]), "all": rows}).save_to_disk(tmp_path / "splits")
    sources = [
        DataSource(str(tmp_path / "a.parquet")),
        DataSource(str(tmp_path / "saved")),
        DataSource(str(tmp_path / "splits"), split="all"),
    ]
    for source in sources:
        check(load_instructions([source], "data.train", tokenizer, 200), tokenizer, name)
