"""Streams of rows: their order, and going on where they stood."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.readers import RowSource, open_source
from dsmoelora.data.streams import MixedStream, SetStream, ShuffledStream
from dsmoelora.errors import DataError
from tests.rows import SIZES, task, three_sources, write


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    return three_sources(tmp_path)


def stream(sources: list[DataSource], weights: list[float] | None, block_size: int, seed: int = 3) -> ShuffledStream:
    sets = [SetStream(open_source(source, streaming=True)) for source in sources]
    return ShuffledStream(MixedStream(sets, weights), seed, block_size)


def questions(rows: ShuffledStream, count: int) -> list[str]:
    return [rows.next().content["instruction"] for _ in range(count)]


@pytest.mark.parametrize("block_size", [1, 4, 29, 1000])
def test_joined_sets_give_every_row_once_an_epoch(sources: list[DataSource], block_size: int) -> None:
    rows = stream(sources, None, block_size)
    everything = sorted(f"{name}{i}" for name, size in SIZES.items() for i in range(size))
    epochs = [questions(rows, 29) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert rows.epoch == 2
    assert (epochs[0] == epochs[1]) == (block_size == 1), "only unshuffled epochs are alike"


def test_unshuffled_sets_take_turns_until_each_is_at_its_end(sources: list[DataSource]) -> None:
    turns = [f"{name}{i}" for i in range(13) for name in "abc" if i < SIZES[name]]
    assert questions(stream(sources, None, 1), 29) == turns


@pytest.mark.parametrize("block_size", [1, 8])
def test_weights_are_shares(sources: list[DataSource], block_size: int) -> None:
    found = Counter(question[0] for question in questions(stream(sources, [3.0, 1.0, 2.0], block_size), 600))
    for name, share in zip("abc", (300, 100, 200), strict=True):
        assert abs(found[name] - share) <= block_size


def test_rows_are_shuffled_within_their_block_by_the_seed(sources: list[DataSource]) -> None:
    plain, one, other = (questions(stream(sources, None, size, seed), 29) for size, seed in ((1, 0), (10, 0), (10, 1)))
    assert plain != one != other
    for order in (one, other):
        assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [sorted(plain[i : i + 10]) for i in (0, 10, 20)]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 2.0]], ids=["joined", "weighted"])
@pytest.mark.parametrize("block_size", [1, 10, 1000])
def test_a_stream_goes_on_where_it_stood(
    sources: list[DataSource], weights: list[float] | None, block_size: int
) -> None:
    straight = questions(stream(sources, weights, block_size), 100)
    rows, found = stream(sources, weights, block_size), []
    for count in (0, 1, 9, 19, 1, 28, 2, 40):  # inside blocks, between blocks, between epochs, and twice in a row
        state = json.loads(json.dumps(rows.state()))
        rows = stream(sources, weights, block_size)
        rows.load_state(state)
        found += questions(rows, count)
    assert found == straight


def test_a_stream_that_has_moved_goes_back_to_its_beginning(sources: list[DataSource]) -> None:
    rows = stream(sources, None, 10)
    beginning = rows.state()
    straight = questions(rows, 40)
    rows.load_state(beginning)
    assert rows.state() == beginning
    assert questions(rows, 40) == straight


@pytest.mark.parametrize("block_size", [1, 5, 100])
def test_a_set_that_the_library_streams_goes_on_where_it_stood(tmp_path: Path, block_size: int) -> None:
    """As a hub name gives it: an `IterableDataset` over several files, which all passes share."""
    files = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    for file in files:
        datasets.Dataset.from_list([{"instruction": f"{file} {i}"} for i in range(7)]).to_parquet(file)

    def begin() -> ShuffledStream:
        found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        source = RowSource("owner/set", (), lambda: enumerate(found, start=1), found)
        next(iter(source.read()))  # whoever looked at the first row leaves no trace
        return ShuffledStream(MixedStream([SetStream(source)], None), 0, block_size)

    straight = questions(begin(), 70)
    everything = sorted(f"{file} {i}" for file in files for i in range(7))
    assert [sorted(straight[i : i + 21]) for i in (0, 21, 42)] == [everything] * 3
    rows, found = begin(), []
    for count in (3, 1, 20, 0, 25, 21):
        state = json.loads(json.dumps(rows.state()))
        rows = begin()
        rows.load_state(state)
        found += questions(rows, count)
    assert found == straight


def test_a_state_holds_no_rows(sources: list[DataSource]) -> None:
    """A shuffle buffer is worth as much as its rows, and a checkpoint is no place for them."""
    rows = stream(sources, None, 1000)
    questions(rows, 20)
    assert "xxx" not in json.dumps(rows.state()) and len(json.dumps(rows.state())) < 2000


def test_a_set_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    read: list[int] = []
    source = open_source(write(tmp_path / "a.jsonl", [task(str(i)) for i in range(1000)]), streaming=True)

    def counted() -> Iterator[tuple[int, Any]]:
        for row in source.read():
            read.append(row[0])
            yield row

    rows = ShuffledStream(MixedStream([SetStream(replace(source, read=counted))], None), 0, 50)
    questions(rows, 51)
    assert len(read) <= 101


def test_a_set_that_shrank_is_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [task(str(i)) for i in range(20)])
    rows = stream([source], None, 100)
    questions(rows, 15)
    state = rows.state()
    write(Path(source.path), [task("a")])
    with pytest.raises(DataError, match="fewer rows than when the checkpoint was saved"):
        stream([source], None, 100).load_state(state)
