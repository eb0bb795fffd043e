"""Training sets that are too large to be kept: rows are read and tokenised while they are learned from.

Global batch n is the rows [n * batch_size, (n + 1) * batch_size) of one stream (see `streams.py`), which every rank
reads and of which it tokenises its share alone. A row that is wrong, or has nothing to learn within `max_length`,
leaves its place empty. So what a step learns from depends neither on the number of ranks nor on where a run was
resumed, and the state is the same on all ranks; but nobody knows the other ranks' tokens, so the counts of a batch are
summed up before its first forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data.chat import MERGED, REWRITTEN
from dsmoelora.data.dataset import IGNORED, InstructionDataset, labels_of
from dsmoelora.data.formats import Conversation, RowParser, read_conversations
from dsmoelora.data.loader import MicroBatch, Row, by_length, collate
from dsmoelora.data.readers import open_source
from dsmoelora.data.report import SetReport
from dsmoelora.data.streams import MixedStream, RawRow, SetStream, ShuffledStream, State
from dsmoelora.data.tokenised import ROWS_SCHEMA, TokenisedSet, TokeniseOptions, row_columns, settings_digest, tokenise
from dsmoelora.errors import DataError

logger = logging.getLogger(__name__)

_TOLD = 3  # batches of which a wrong row is spelled out
_COUNTS = ("rows", "skipped", "truncated", "dropped")
_APART = (REWRITTEN, MERGED)  # of each the conversations that have a row for each answer, and these rows


@dataclass(frozen=True)
class Peers:
    """The other ranks, and what is asked of them; by default there are none.

    Args:
        rank, world_size: which share of a batch is this rank's
        together: runs a function on every rank, and fails on all when it fails on one
        sums: of each number over all ranks
        gather: every rank's JSON-able object on rank 0, None elsewhere
    """

    rank: int = 0
    world_size: int = 1
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()
    sums: Callable[[list[float]], list[float]] = list
    gather: Callable[[Any], list[Any] | None] = lambda own: [own]


@dataclass(frozen=True)
class _Share:
    """This rank's part of a global batch.

    Args:
        rows: those with something to learn, with their places in the stream
        samples: of the rows, by number: token ids and labels
        counts: (sets, 8) of `_COUNTS` and `_APART`
        problems: of rows that are skipped, each with its set and number
    """

    rows: list[Row]
    samples: list[tuple[list[int], list[int]]]
    counts: np.ndarray
    problems: list[str]

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels."""
        return self.samples[index]

    @property
    def num_supervised(self) -> int:
        """Targets that enter the loss."""
        return sum(label != IGNORED for _, labels in self.samples for label in labels)

    def groups(self, num_groups: int, group_size: int, pad_token_id: int) -> list[list[Row]]:
        """The rows of each forward pass, the longest first.

        Every rank makes the same number of passes: where rows run out, one has a single token that is not learned.
        """
        rows = by_length(self.rows)
        group_size = max(group_size, -(-len(rows) // num_groups))  # conversations with a row for each answer have more
        groups = [rows[i * group_size : (i + 1) * group_size] for i in range(num_groups)]
        if not groups[-1]:
            self.samples.append(([pad_token_id], [IGNORED]))
        filler = Row(np.array([len(self.samples) - 1]), 0, 1, counts=False)
        return [group or [filler] for group in groups]


class StreamedSets:
    """Training sets, mixed, shuffled in blocks and tokenised on the fly.

    Args:
        sources: joined, or mixed by their weights
        key: recipe key that names the sources, for messages
        tokenizer: a fast tokenizer with a chat template
        options: `num_proc` and `progress` mean nothing here
        seed: decides the order
        block_size: rows that are shuffled with each other, and in memory at once

    Attributes:
        fingerprint: changes with names, sizes and order of the sources, weights, tokenizer, chat template and options

    Raises:
        DataError: a source is missing, of an unknown format, or has no right row
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        key: str,
        tokenizer: PreTrainedTokenizerBase,
        options: TokeniseOptions,
        seed: int,
        block_size: int,
    ) -> None:
        self._key, self._tokenizer, self._options = key, tokenizer, options
        self._opened = [open_source(source, streaming=True) for source in sources]
        self._parsers = []
        for source, opened in zip(sources, self._opened, strict=True):
            parser = RowParser(source, opened.name, options.on_bad_row)
            self._check_teaches(read_conversations(source, options.on_bad_row, opened, parser), opened.name)
            self._parsers.append(parser)
        weights = [weight for source in sources if (weight := source.weight) is not None] or None
        sets = [SetStream(opened) for opened in self._opened]
        self._stream = ShuffledStream(MixedStream(sets, weights), seed, block_size)
        self._num_places = 0
        self._counts = np.zeros((len(sets), len(_COUNTS) + 2 * len(_APART)), dtype=np.int64)
        self._num_told = 0
        self.fingerprint = self._fingerprint(sources, weights, block_size)

    def _check_teaches(self, rows: Iterable[Conversation], name: str) -> None:
        """Some row of a set has something to learn: otherwise it would leave its places in all batches empty."""
        problem = ""
        for row in rows:
            tokens = tokenise([row], self._tokenizer, self._options)
            if any(tokens["num_supervised"]):
                return
            problem = problem or f"{row.origin}: {tokens['problem'][0]}" * bool(tokens["problem"][0])
        first = f" (the first of them: {problem})" if problem else ""
        raise DataError(
            f"{self._key}: no row of {name} has a token to learn within data.max_length = {self._options.max_length}"
            f"{first}. Correct the rows, raise data.max_length, or take {name} out."
        )

    def _fingerprint(self, sources: Sequence[DataSource], weights: list[float] | None, block_size: int) -> str:
        sizes = [[opened.name, opened.num_bytes] for opened in self._opened]
        settings = [settings_digest(source, self._tokenizer, self._options).hexdigest() for source in sources]
        identity = json.dumps([sizes, settings, weights, block_size])
        return f"streamed {hashlib.sha256(identity.encode()).hexdigest()}"

    def state(self) -> State:
        """Where the stream stands and what was counted; JSON-able, the same on all ranks."""
        return {"num_places": self._num_places, "counts": self._counts.tolist(), "stream": self._stream.state()}

    def load_state(self, state: State) -> None:
        """Go on where it stood, with any number of ranks.

        Raises:
            DataError: a set cannot be read, or has changed
        """
        self._num_places = state["num_places"]
        self._counts = np.array(state["counts"], dtype=np.int64)
        self._stream.load_state(state["stream"])

    @property
    def reports(self) -> list[SetReport]:
        """What was lost of each set since the run began, of all ranks; a row counts each time that it comes."""
        everything = zip(self._opened, self._counts.tolist(), strict=True)
        return [
            SetReport(opened.name, rows, skipped, (), truncated, dropped, _splits(apart))
            for opened, (rows, skipped, truncated, dropped, *apart) in everything
        ]

    def metrics(self) -> dict[str, float | None]:
        """How far the sets were read, and what was lost of them."""
        totals = self._counts.sum(axis=0).tolist()
        lost = dict(zip(_COUNTS, totals, strict=False)) | {"split": sum(totals[len(_COUNTS) :: 2])}
        of_rows = {f"data/{what}_rows": float(lost[what]) for what in (*_COUNTS[1:], "split")}
        return {"data/epoch": float(self._stream.epoch), **of_rows}

    def steps(
        self, *, batch_size: int, micro_batch_size: int, peers: Peers, pad_token_id: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of one optimizer step after the other, without end (collective).

        Args:
            batch_size: places of all ranks per step
            micro_batch_size: places of one rank per forward; fewer in the last where the batch size is no multiple
            peers: of this rank
            pad_token_id: fills the shorter rows

        Raises:
            DataError: a set cannot be read, a row is wrong, or an epoch has nothing to learn; on all ranks
        """
        num_forwards = -(-batch_size // (micro_batch_size * peers.world_size))
        empty_since: int | None = None  # the epoch in which the last batch with something to learn was
        while True:
            epoch = self._stream.epoch
            share = peers.together(lambda: self._read(batch_size, peers))
            groups = share.groups(num_forwards, micro_batch_size, pad_token_id)
            totals = self._count(share, peers)
            if totals[0]:
                empty_since = None
                yield [collate(share, group, pad_token_id, totals, packed=False) for group in groups]
                continue
            empty_since = epoch if empty_since is None else empty_since
            if self._stream.epoch > empty_since + 1:
                raise self._nothing_to_learn()

    def _read(self, batch_size: int, peers: Peers) -> _Share:
        """The next batch's rows, of which this rank takes every `world_size`-th."""
        first, self._num_places = self._num_places, self._num_places + batch_size
        rows = [self._stream.next() for _ in range(batch_size)]
        own = list(range(peers.rank, batch_size, peers.world_size))
        return self._share([rows[place] for place in own], [first + place for place in own])

    def _share(self, rows: list[RawRow], places: list[int]) -> _Share:
        conversations = [self._parsers[row.set_number](row.number, row.content) for row in rows]
        tokens = tokenise(conversations, self._tokenizer, self._options)
        num_supervised = np.array(tokens["num_supervised"])
        skipped = np.array([bool(problem) for problem in tokens["problem"]])
        learned = num_supervised > 0
        of_row = tokens["place"]
        first = np.diff(np.array(of_row), prepend=-1) > 0  # of a row
        flags = [first, skipped, np.array(tokens["truncated"]) & learned, ~learned & ~skipped]
        for why in _APART:
            apart = np.array([split == why for split in tokens["split"]], dtype=bool)
            flags += [apart & first, apart]
        counts = np.zeros_like(self._counts)
        np.add.at(counts, [rows[i].set_number for i in of_row], np.stack(flags, axis=1))
        kept = np.flatnonzero(learned).tolist()
        return _Share(
            [Row(np.array([i]), places[of_row[k]], tokens["num_tokens"][k]) for i, k in enumerate(kept)],
            [(ids := tokens["input_ids"][k], labels_of(ids, tokens["supervised"][k])) for k in kept],
            counts,
            [f"{conversations[of_row[k]].origin}: {tokens['problem'][k]}" for k in np.flatnonzero(skipped).tolist()],
        )

    def _count(self, share: _Share, peers: Peers) -> tuple[int, int]:
        """Targets and tokens of the global batch; what was lost of the sets is added up, and said where it is new."""
        num_tokens = sum(row.num_tokens for row in share.rows)
        sums = peers.sums([share.num_supervised, num_tokens, *share.counts.ravel().tolist()])
        lost = np.array(sums[2:], dtype=np.int64).reshape(self._counts.shape)
        self._counts += lost
        if lost[:, _COUNTS.index("skipped")].any() and self._num_told < _TOLD:
            self._num_told += 1  # of batches, for this number is the same on all ranks
            problems = [problem for each in peers.gather(share.problems[:1]) or [] for problem in each]
            for problem in problems[:1]:
                logger.warning("%s: skipped %s The metrics count such rows: data/skipped_rows", self._key, problem)
        return int(sums[0]), int(sums[1])

    def _nothing_to_learn(self) -> DataError:
        lost = " ".join(line for report in self.reports if (line := report.losses()))
        return DataError(
            f"{self._key}: a whole epoch has nothing to learn within data.max_length = {self._options.max_length} "
            f"({lost}). Correct the rows, raise data.max_length or shorten the prompts."
        )


def _splits(apart: list[int]) -> tuple[tuple[str, int, int], ...]:
    """As in `SetReport`."""
    numbers = zip(_APART, apart[::2], apart[1::2], strict=True)
    return tuple((why, num_conversations, num_rows) for why, num_conversations, num_rows in numbers if num_rows)


def first_samples(
    sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions, count: int
) -> InstructionDataset:
    """The samples of the first `count` rows of each set, in memory.

    Raises:
        DataError: a source or one of these rows is wrong
    """
    sets = []
    for source in sources:
        opened = open_source(source, streaming=True)
        conversations = list(islice(read_conversations(source, options.on_bad_row, opened), count))
        rows = datasets.Dataset(pyarrow.Table.from_pydict(row_columns(conversations), schema=ROWS_SCHEMA))
        tokens = datasets.Dataset.from_dict(tokenise(conversations, tokenizer, options))
        sets.append(TokenisedSet(opened.name, rows, tokens, ""))
    return InstructionDataset(sets, None)
