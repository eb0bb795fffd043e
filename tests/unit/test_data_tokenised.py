"""Reading and tokenising as a whole: what is skipped, counted, shown and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data import InstructionDataset, load_instructions
from dsmoelora.data.report import all_losses
from dsmoelora.errors import DataError, ModelError
from tests.helpers import CHATML_TEMPLATE, tiny_tokenizer

ROW = {"instruction": "q", "output": "a"}


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tiny_tokenizer(tmp_path / "tokenizer")


def write(path: Path, *rows: Any) -> DataSource:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return DataSource(str(path))


def load(tokenizer: PreTrainedTokenizerBase, *sources: DataSource, **options: Any) -> InstructionDataset:
    return load_instructions(sources, "data.train", tokenizer, options.pop("max_length", 60), **options)


def test_losses_are_reported_by_source(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    wrong = [{"instruction": "q"}, None, {**ROW, "output": ""}, {**ROW, "output": 3}]
    one = write(tmp_path / "one.jsonl", ROW, *wrong, ROW)
    long = [{**ROW, "output": "a" * 99}, {**ROW, "instruction": "q" * 99}]
    other = write(tmp_path / "other.jsonl", *long, ROW)
    dataset = load(tokenizer, one, other, write(tmp_path / "fine.jsonl", ROW), on_bad_row="skip")
    assert dataset.mixture.sizes == [2, 2, 1]
    assert [dataset.origin(i).rpartition("/")[2] for i in range(5)] == [
        "one.jsonl, row 1",
        "one.jsonl, row 6",
        "other.jsonl, row 1",
        "other.jsonl, row 3",
        "fine.jsonl, row 1",
    ]
    first, second = all_losses(dataset.reports)
    assert first.startswith(f"{one.path}: 4 of 6 rows skipped (row 2: output is missing")
    assert "row 3: it is null" in first and "row 4: output is empty" in first and first.endswith(" ...)")
    assert second == (
        f"{other.path}: 1 of 3 cut at data.max_length; 1 of 3 left out, for nothing to learn was left of them"
    )


def test_the_report_comes_from_the_cache_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", ROW, None)
    reports = [load(tokenizer, source, on_bad_row="skip").reports for _ in range(2)]
    assert reports[0] == reports[1] and reports[0][0].num_skipped == 1
    with pytest.raises(DataError, match=r"row 2: it is null.*data\.on_bad_row: skip"):  # the cache hides no error
        load(tokenizer, source)


def test_rows_that_the_template_refuses_are_wrong_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML_TEMPLATE
    )
    source = write(tmp_path / "a.jsonl", ROW, {**ROW, "system": "S"}, ROW)
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: the model's chat template refuses it: no system here"):
        load(tokenizer, source)
    dataset = load(tokenizer, source, on_bad_row="skip")
    assert len(dataset) == 2
    assert "1 of 3 rows skipped (row 2: the model's chat template refuses it" in dataset.reports[0].losses()


def test_every_row_is_wrong(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", {**ROW, "output": ""}, {**ROW, "output": None})
    with pytest.raises(DataError, match=r"every row of .*a\.jsonl is wrong: row 1: output is empty"):
        load(tokenizer, source, on_bad_row="skip")


def test_processes_give_what_one_gives(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**ROW, "instruction": "q" * (1 + i % 7), "output": "a" * (1 + i % 5)} for i in range(700)]
    rows[400]["output"] = ""
    source = write(tmp_path / "a.jsonl", *rows)
    one = load(tokenizer, source, on_bad_row="skip", num_proc=1)
    for folder in (tmp_path / "cache" / "dsmoelora").iterdir():
        folder.rename(folder.with_name(f"_{folder.name}"))
    three = load(tokenizer, source, on_bad_row="skip", num_proc=3)
    assert len(list((tmp_path / "cache" / "dsmoelora").glob("[!_]*/tokens*.arrow"))) == 3
    assert [one.sample(i) for i in range(699)] == [three.sample(i) for i in range(699)]
    assert one.reports == three.reports and one.origin(400) == three.origin(400) and one.origin(400).endswith("row 402")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_errors_come_out_of_processes_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, num_proc: int) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # ends no answer
    source = write(tmp_path / "a.jsonl", *[ROW] * 600)
    with pytest.raises(ModelError, match="no special token after the assistant's answer"):
        load(tokenizer, source, num_proc=num_proc)


@pytest.mark.parametrize("progress", [False, True])
def test_a_bar_is_shown_to_whom_it_is_promised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, progress: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", *[ROW] * 3)
    load(tokenizer, source, progress=progress)
    shown = capfd.readouterr().err
    assert ("Tokenising" in shown and "Reading" in shown and "3/3" in shown) == progress
    load(tokenizer, source, progress=True)
    assert "Tokenising" not in capfd.readouterr().err  # there was nothing to do


def test_what_was_left_half_done_is_made_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", ROW)
    load(tokenizer, source)
    (whole,) = [path for path in (tmp_path / "cache" / "dsmoelora").iterdir() if path.is_dir()]
    part = whole.with_suffix(".part")
    whole.rename(part)
    (part / "tokens.arrow").write_bytes(b"half")
    assert len(load(tokenizer, source)) == 1
    assert whole.exists() and not part.exists()


def test_formats_and_fields_are_part_of_the_identity(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "text": "t", "reply": "other"}).path
    sources = [
        DataSource(path),
        DataSource(path, format="text"),
        DataSource(path, fields={"output": "reply"}),
    ]
    assert len({load(tokenizer, source).fingerprint for source in sources}) == 3
    assert load(tokenizer, sources[0]).fingerprint == load(tokenizer, DataSource(path)).fingerprint
    (text, labels) = load(tokenizer, sources[1]).sample(0)
    assert tokenizer.decode(text) == "t<|im_end|>" and labels == [-100, text[1]]
    assert load(tokenizer, sources[2]).messages(0)[-1]["content"] == "other"
