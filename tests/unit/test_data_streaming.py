"""Streamed training sets: order, shares of ranks, what is lost on the way, and going on where it stood."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataConfig, DataSource
from dsmoelora.data import MicroBatch, load_instructions
from dsmoelora.data.chat import REWRITTEN
from dsmoelora.data.preview import preview
from dsmoelora.data.streaming import Peers, StreamedSets, first_samples
from dsmoelora.data.tokenised import TokeniseOptions
from dsmoelora.errors import ConfigError, DataError, UserError
from tests.chat_styles import tokenizer_of
from tests.helpers import tiny_tokenizer
from tests.rows import task, three_sources, write
from tests.threaded_ranks import ThreadedComm


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    return three_sources(tmp_path)


# Batches


def streamed(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, block_size: int = 10, **options: Any
) -> StreamedSets:
    return StreamedSets(
        sources, "data.train", tokenizer, TokeniseOptions(**{"max_length": 60} | options), 3, block_size
    )


def peers(comm: ThreadedComm) -> Peers:
    return Peers(comm.rank(), comm.world_size(), comm.together, comm.all_reduce_sum, comm.gather_objects)


def steps(
    sources: list[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    world_size: int = 1,
    micro: int = 2,
    batch_size: int = 8,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[list[MicroBatch]], list[dict[str, Any]]]:
    """Micro-batches of all ranks, step by step, and every rank's state after each step."""
    comm = ThreadedComm(world_size)

    def of_rank(_: int) -> Any:
        data = streamed(sources, tokenizer, **options)
        if state is not None:
            data.load_state(json.loads(json.dumps(state)))
        batches = data.steps(batch_size=batch_size, micro_batch_size=micro, peers=peers(comm), pad_token_id=0)
        return [(step, json.loads(json.dumps(data.state()))) for step in islice(batches, count)]

    outcomes = comm.run(of_rank)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    assert all(len({json.dumps(state) for _, state in turn}) == 1 for turn in zip(*outcomes, strict=True))
    per_step = [[batch for step, _ in turn for batch in step] for turn in zip(*outcomes, strict=True)]
    return per_step, [state for _, state in outcomes[0]]


def rows_of(batches: list[MicroBatch]) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sequence id -> tokens and labels, of rows that are learned from."""
    found = {}
    for batch in batches:
        for i, sequence in enumerate(batch.sequence_ids.tolist()):
            length = int(batch.attention_mask[i].sum())
            labels = tuple(batch.labels[i, :length].tolist())
            if any(label != -100 for label in labels):
                assert sequence not in found
                found[sequence] = (tuple(batch.input_ids[i, :length].tolist()), labels)
    return found


def test_streamed_samples_are_those_of_the_sets_that_are_kept(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and masks of one epoch, 29 rows in four batches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found, _ = steps(sources, tokenizer, 4)
    rows = [row for step in found for place, row in rows_of(step).items() if place < 29]
    kept = load_instructions(sources, "data.train", tokenizer, 60)
    assert sorted(rows) == sorted((tuple(ids), tuple(labels)) for ids, labels in map(kept.sample, range(len(kept))))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_what_a_step_learns_does_not_depend_on_ranks(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, world_size: int, micro: int
) -> None:
    (found, states), (expected, same) = (
        steps(sources, tokenizer, 6, world_size=number, micro=size) for number, size in ((world_size, micro), (1, 2))
    )
    assert states == same
    for step, other in zip(found, expected, strict=True):
        assert rows_of(step) == rows_of(other)
        supervised = sum(batch.num_supervised_local for batch in step)
        tokens = sum(int(batch.attention_mask.sum()) for batch in step)
        assert {(b.num_supervised_global, b.num_tokens_global) for b in step} == {(supervised, tokens)}
    assert [sorted(rows_of(step)) for step in found] == [list(range(8 * n, 8 * n + 8)) for n in range(6)]


@pytest.mark.parametrize(("world_size", "micro"), [(2, 4), (3, 2), (4, 4)])
def test_a_batch_that_is_no_multiple_has_the_same_rows(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, world_size: int, micro: int
) -> None:
    """Of 5 rows; every rank makes as many forward passes as the next."""
    (expected, _), (found, _) = (
        steps(sources, tokenizer, 2, world_size=number, micro=size, batch_size=5)
        for number, size in ((1, 5), (world_size, micro))
    )
    assert [rows_of(step) for step in found] == [rows_of(step) for step in expected]
    assert all(len(step) % world_size == 0 for step in found)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_after_a_resume_are_equal_at_any_number_of_ranks(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase, world_size: int
) -> None:
    straight, states = steps(sources, tokenizer, 9, world_size=2)
    for stop in (1, 4, 7):
        found, again = steps(sources, tokenizer, 9 - stop, world_size=world_size, state=states[stop - 1])
        assert [rows_of(step) for step in found] == [rows_of(step) for step in straight[stop:]]
        assert again == states[stop:]


def test_a_set_smaller_than_a_batch_comes_several_times(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("a"), task("b"), task("c")])
    ((step,), _) = steps([source], tokenizer, 1, batch_size=8, micro=8)
    found = Counter(ids for ids, _ in rows_of(step).values())
    assert sorted(found.values()) == [2, 3, 3]


# What is lost


def test_wrong_and_cut_rows_leave_their_places_empty_and_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [task("a"), "{broken", task("b", ""), task("c", "x" * 90), task("q" * 90), task("d")]
    source = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        found, states = steps([source], tokenizer, 2, batch_size=6, micro=1, world_size=2, on_bad_row="skip")
    assert states[1]["counts"] == [[12, 4, 2, 2, 0, 0, 0, 0]]  # rows, skipped, cut, left out; taken apart
    assert sum(
        "a.jsonl, row 2: invalid JSON" in r.message or "row 3: output is empty" in r.message for r in caplog.records
    )
    for step in found:
        assert len(rows_of(step)) == 3
        assert {batch.num_supervised_global for batch in step} == {sum(b.num_supervised_local for b in step)}
        filler = [batch for batch in step if batch.num_supervised_local == 0]
        assert len(filler) == 3, "places of six that are empty"
        assert all(batch.input_ids.tolist() == [[0]] and batch.attention_mask.tolist() == [[1]] for batch in filler)
        assert not any(batch.real_tokens.any() for batch in filler), "what only keeps ranks in step counts nowhere"
        num_tokens = sum(len(ids) for ids, _ in rows_of(step).values())
        assert {batch.num_tokens_global for batch in step} == {num_tokens}
        assert sum(int(batch.real_tokens.sum()) for batch in step) == num_tokens
    data = streamed([source], tokenizer, on_bad_row="skip")
    data.load_state(states[1])
    (report,) = data.reports
    assert report.losses().endswith(
        "4 of 12 rows skipped; 2 of 12 cut at data.max_length; 2 of 12 left out, for nothing to learn was left of them"
    )
    assert data.metrics()["data/truncated_rows"] == 2


def test_conversations_that_are_taken_apart_are_counted(tmp_path: Path) -> None:
    roles = ("user", "assistant") * 2
    talks = [
        {"messages": [{"role": role, "content": f"{i}{letter}"} for role, letter in zip(roles, "abcd", strict=True)]}
        for i in range(3)
    ]
    short = {"messages": talks[0]["messages"][:2]}
    source = write(tmp_path / "a.jsonl", [*talks, short])
    data = streamed([source], tokenizer_of("thinking"), max_length=200)
    batches = data.steps(batch_size=4, micro_batch_size=2, peers=Peers(), pad_token_id=0)
    assert sum(len(batch.input_ids) for batch in next(batches)) == 3 * 2 + 1
    (report,) = data.reports
    assert report.losses().endswith(f"3 of 4 became 6 rows, one for each answer, because {REWRITTEN}")
    assert data.metrics()["data/split_rows"] == 3


def test_a_batch_of_wrong_rows_alone_is_passed_over(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("a"), "{", "{", "{", task("b"), task("c")])
    found, _ = steps([source], tokenizer, 2, batch_size=2, micro=1, world_size=2, block_size=1, on_bad_row="skip")
    assert [sorted(rows_of(step)) for step in found] == [[0], [4, 5]]


def test_a_wrong_row_stops_all_ranks(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("a"), task("b"), task("c"), task("d", "")])
    comm = ThreadedComm(2)

    def of_rank(_: int) -> None:
        data = streamed([source], tokenizer, block_size=1)
        next(data.steps(batch_size=4, micro_batch_size=2, peers=peers(comm), pad_token_id=0))

    first, second = comm.run(of_rank)
    assert isinstance(second, DataError) and "a.jsonl, row 4: output is empty" in str(second)
    assert isinstance(first, UserError) and str(first).startswith("rank 1: ") and str(second) in str(first)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([task("q" * 90)] * 5, r"no row of .*b\.jsonl has a token to learn within data\.max_length = 60"),
        (
            [{**task("a"), "tools": [{"name": "f"}]}] * 3,
            r"no row of .*\(the first of them: .*b\.jsonl, row 1: the model's chat template leaves out tools",
        ),
        ([task("a", "")] * 3, r"every row of .*b\.jsonl is wrong: row 1: output is empty"),
    ],
)
def test_a_set_without_one_right_row_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], why: str
) -> None:
    """Also beside a good one, whose batches would be half empty."""
    good = write(tmp_path / "a.jsonl", [task("a")] * 5)
    with pytest.raises(DataError, match=why):
        streamed([good, write(tmp_path / "b.jsonl", rows)], tokenizer, on_bad_row="skip")
    late = write(tmp_path / "b.jsonl", [*rows, task("a")])
    streamed([good, late], tokenizer, on_bad_row="skip")


def test_an_epoch_without_anything_to_learn_ends_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("a")])
    data = streamed([source], tokenizer)
    write(tmp_path / "a.jsonl", [task("q" * 90)] * 5)  # written anew by somebody else
    with pytest.raises(DataError, match=r"data\.train: a whole epoch .* data\.max_length = 60 .* left out"):
        next(data.steps(batch_size=2, micro_batch_size=2, peers=Peers(), pad_token_id=0))


def test_a_file_that_vanishes_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("a"), task("b")])
    data = streamed([source], tokenizer, block_size=1)
    batches = data.steps(batch_size=2, micro_batch_size=2, peers=Peers(), pad_token_id=0)
    next(batches)
    Path(source.path).unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read on after 0 rows \(.*No such file.*--resume auto"):
        next(batches)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "holds no rows"),
        ([{"a": 1}], "fit no known format"),
        (['[{"instruction": "a", "output": "b"}]'], "holds a JSON array, which is read as a whole"),
    ],
)
def test_sets_that_cannot_be_streamed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        streamed([write(tmp_path / "a.json", rows)], tokenizer)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"packing": True}, "data.packing is True, but it must be false with data.streaming"),
        ({"num_proc": 2}, "data.num_proc is 2, but it must be null with data.streaming"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0, but it must be 1 or more"),
        ({"shuffle_buffer": 5, "streaming": False}, "data.shuffle_buffer is 5, but it must be null without"),
    ],
)
def test_keys_that_do_not_go_with_streaming(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DataConfig(**{"streaming": True} | keys)


def test_the_fingerprint_changes_with_what_decides_about_samples(
    sources: list[DataSource], tokenizer: PreTrainedTokenizerBase
) -> None:
    def of(sources: list[DataSource], **options: Any) -> str:
        return streamed(sources, tokenizer, **options).fingerprint

    plain = of(sources)
    assert plain == of(sources) and plain.startswith("streamed ")
    weighted = [DataSource(source.path, weight) for source, weight in zip(sources, (1.0, 2.0, 3.0), strict=True)]
    others = [of(sources[::-1]), of(weighted), of(sources, max_length=50), of(sources, block_size=11)]
    with Path(sources[0].path).open("a") as file:
        file.write(json.dumps(task("one more")) + "\n")
    assert len({plain, *others, of(sources)}) == 6


def test_a_preview_reads_the_first_rows_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "a.jsonl", [task("first"), task("second"), "{broken"])
    samples = first_samples([source], tokenizer, TokeniseOptions(60), 2)
    text = preview(samples, tokenizer, 2)
    assert "a.jsonl, row 2" in text and "⟦yes<|im_end|>⟧" in text
