from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data import InstructionDataset, load_instructions
from dsmoelora.data import tokenised as tokenised_module
from dsmoelora.errors import DataError, ModelError
from tests.helpers import CHATML_TEMPLATE, tiny_tokenizer

# One token a byte: "<|im_start|>user\n" 6, the question, "<|im_end|>\n" 2, "<|im_start|>assistant\n" 11, the answer,
# "<|im_end|>\n" 2.
FRAME, PROMPT_FRAME = 21, 19


def row(question: int, answer: int) -> dict[str, str]:
    return {"instruction": "q" * question, "output": "a" * answer}


def write(path: Path, *rows: Any) -> DataSource:
    path.write_text("".join(f"{json.dumps(r)}\n" for r in rows), encoding="utf-8")
    return DataSource(str(path))


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tiny_tokenizer(tmp_path / "tokenizer")


def load(sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, max_length: int = 100) -> InstructionDataset:
    return load_instructions(sources, "data.train", tokenizer, max_length)


def test_samples_counts_and_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [write(tmp_path / "a.jsonl", row(2, 3), row(4, 1)), write(tmp_path / "b.jsonl", row(1, 1))]
    dataset = load(sources, tokenizer)
    assert len(dataset) == 3
    assert dataset.num_tokens.tolist() == [FRAME + 5, FRAME + 5, FRAME + 2]
    assert dataset.num_supervised.tolist() == [4, 2, 2]  # the answer and its end
    ids, labels = dataset.sample(0)
    assert labels == [-100] * (PROMPT_FRAME + 2) + [*tokenizer("aaa<|im_end|>").input_ids, -100]
    assert tokenizer.decode(ids) == "<|im_start|>user\nqq<|im_end|>\n<|im_start|>assistant\naaa<|im_end|>\n"
    assert dataset.messages(1) == [{"role": "user", "content": "qqqq"}, {"role": "assistant", "content": "a"}]
    assert dataset.origin(2) == f"{tmp_path / 'b.jsonl'}, row 1"
    assert (dataset.num_truncated, dataset.num_dropped) == (0, 0)


def test_truncation_cuts_the_end_and_drops_what_has_nothing_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    limit = PROMPT_FRAME + 10
    # fits to the last token but its final newline; cut in the answer; one token left; nothing left; far too long
    source = write(tmp_path / "a.jsonl", row(1, 8), row(1, 30), row(9, 5), row(10, 5), row(50, 5))
    dataset = load([source], tokenizer, limit)
    assert dataset.num_tokens.tolist() == [limit] * 3
    assert dataset.num_supervised.tolist() == [9, 9, 1]
    assert (dataset.num_truncated, dataset.num_dropped) == (3, 2)
    ids, labels = dataset.sample(1)
    assert labels[-9:] == ids[-9:] == tokenizer("a" * 9).input_ids
    assert [dataset.origin(i)[-5:] for i in range(3)] == ["row 1", "row 2", "row 3"]


def test_nothing_left_at_all(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", row(9, 1), row(9, 2))
    with pytest.raises(DataError, match=r"data\.train\[0\]: none .* .*a\.jsonl .* data\.max_length = 10"):
        load([source], tokenizer, 10)


def test_first_token_is_never_a_target(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    block = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    only_answers = "{% if m['role'] == 'assistant' %}" + block + "{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + only_answers + "{% endfor %}"
    dataset = load([write(tmp_path / "a.jsonl", row(1, 3))], tokenizer)
    assert dataset.sample(0)[1] == [-100, *tokenizer("aa<|im_end|>").input_ids]
    assert dataset.num_supervised.tolist() == [3]


def test_wrong_row_fails_every_time_and_leaves_no_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", row(1, 1), {"instruction": "x"})
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl, row 2: output is missing"):
            load([source], tokenizer)
    write(tmp_path / "a.jsonl", row(1, 1), row(1, 2))
    assert len(load([source], tokenizer)) == 2


def test_sources_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"data\.train names no file"):
        load([], tokenizer)
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path is empty"):
        load([DataSource()], tokenizer)
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        load([DataSource(str(tmp_path / "gone.jsonl"))], tokenizer)
    with pytest.raises(DataError, match="is a folder, but none that save_to_disk"):
        load([DataSource(str(tmp_path))], tokenizer)


def test_tokenizer_without_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", row(1, 1))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        load([source], tokenizer)


def test_second_time_reads_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", row(2, 3), row(40, 1), row(200, 1))
    first = load([source], tokenizer)
    tokenizer(["a", "bbb"], padding=True)  # changes the tokenizer's inner state, but not what it gives us

    def forbidden(*_: object) -> None:
        raise AssertionError("tokenised a second time")

    monkeypatch.setattr("dsmoelora.data.tokenised.tokenise_chats", forbidden)
    second = load([source], tokenizer)
    assert second.fingerprint == first.fingerprint
    assert [second.sample(i) for i in range(2)] == [first.sample(i) for i in range(2)]
    assert (second.num_truncated, second.num_dropped) == (first.num_truncated, first.num_dropped) == (0, 1)


def test_fingerprint_changes_with_content_template_and_length_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path / "a.jsonl", row(2, 3))
    fingerprints = [load([source], tokenizer).fingerprint, load([source], tokenizer, 101).fingerprint]
    moved = write(tmp_path / "moved.jsonl", row(2, 3))
    assert load([moved], tokenizer).fingerprint == fingerprints[0]
    assert load([moved], tokenizer).origin(0).endswith("moved.jsonl, row 1")
    fingerprints.append(load([write(tmp_path / "b.jsonl", row(2, 4))], tokenizer).fingerprint)
    tokenizer.chat_template = "{% set unused = 1 %}" + CHATML_TEMPLATE
    fingerprints.append(load([source], tokenizer).fingerprint)
    assert len(set(fingerprints)) == 4


def test_ranks_that_load_at_once_tokenise_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", *[row(i, 3) for i in range(1, 20)])
    calls = []
    original = tokenised_module._write_tokens

    def counted(*arguments: Any) -> None:
        calls.append(1)
        original(*arguments)

    monkeypatch.setattr(tokenised_module, "_write_tokens", counted)
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(load([source], tokenizer).num_tokens.tolist())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[FRAME + i + 3 for i in range(1, 20)]] * 4
    assert len(calls) == 1


def test_cache_that_cannot_be_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match="HF_DATASETS_CACHE"):
        load([write(tmp_path / "a.jsonl", row(1, 1))], tokenizer)


def test_counts_agree_with_the_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load([write(tmp_path / "a.jsonl", *[row(i, 20 - i) for i in range(1, 20)])], tokenizer, 33)
    labels = [np.array(dataset.sample(i)[1]) for i in range(len(dataset))]
    assert [int((sample[1:] != -100).sum()) for sample in labels] == dataset.num_supervised.tolist()
    assert [len(sample) for sample in labels] == dataset.num_tokens.tolist()


def weighted(tmp_path: Path, *weights: float | None) -> list[DataSource]:
    sources = [write(tmp_path / f"{i}.jsonl", *[row(1 + i, 1 + j) for j in range(6)]) for i in range(len(weights))]
    return [DataSource(source.path, weight) for source, weight in zip(sources, weights, strict=True)]


def test_weights_decide_how_often_a_set_is_drawn_from(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load(weighted(tmp_path, 3, 1), tokenizer)
    files = [dataset.origin(i).split(",")[0][-7:] for i in dataset.mixture.epoch(0, 0)]
    assert (files.count("0.jsonl"), files.count("1.jsonl")) == (9, 3)


def test_weights_are_part_of_the_fingerprint(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    mixes: list[tuple[float | None, float | None]] = [(None, None), (3, 1), (1, 3)]
    assert len({load(weighted(tmp_path, *mix), tokenizer).fingerprint for mix in mixes}) == 3


def test_a_weight_too_small_for_one_sample(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight is 1e-06.*one of the 12 samples.*1\.jsonl"):
        load(weighted(tmp_path, 1, 1e-6), tokenizer)


def test_another_set_does_not_tokenise_the_first_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = weighted(tmp_path, None, None)
    load([one], tokenizer)
    paths = []
    original = tokenised_module._write_tokens
    monkeypatch.setattr(tokenised_module, "_write_tokens", lambda *a: paths.append(a[1]) or original(*a))
    load([one, other], tokenizer)
    assert paths == [other.path]
