"""The tokenised samples of a run: the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.report import SetReport, report_of
from dsmoelora.data.tokenised import TokenisedSet, TokeniseOptions, tokenised_set
from dsmoelora.data.turns import Message
from dsmoelora.errors import DataError

IGNORED = -100  # the label of what is not supervised, as in torch's cross entropy


def labels_of(input_ids: Sequence[int], supervised: Sequence[bool]) -> list[int]:
    """The tokens themselves where they are supervised, -100 elsewhere."""
    return [token if flag else IGNORED for token, flag in zip(input_ids, supervised, strict=True)]


class InstructionDataset:
    """Tokenised samples by index, those of the first set first.

    Args:
        sets: what was read; rows without anything to learn are left out
        weights: of the sets in training; None joins them

    Attributes:
        num_tokens: (len,) tokens of each sample
        num_supervised: (len,) targets of each sample that enter the loss; the first token is never one
        reports: what was lost of each set
        mixture: which samples make up an epoch
        fingerprint: changes with rows, weights, tokenizer, chat template and max_length
    """

    def __init__(self, sets: Sequence[TokenisedSet], weights: Sequence[float] | None) -> None:
        tokens = datasets.concatenate_datasets([data.tokens for data in sets])
        rows = datasets.concatenate_datasets([data.rows for data in sets])
        num_supervised = np.asarray(tokens.with_format("numpy")["num_supervised"][:], dtype=np.int64)
        kept = np.flatnonzero(num_supervised)
        self._ends = np.searchsorted(kept, np.cumsum([len(data.tokens) for data in sets]))
        self._names = [data.name for data in sets]
        firsts = np.cumsum([0, *(len(data.rows) for data in sets)])[:-1]
        places = np.asarray(tokens.with_format("numpy")["place"][:], dtype=np.int64)
        places = places + np.repeat(firsts, [len(data.tokens) for data in sets])
        self._rows, self._tokens = rows.select(places[kept]), tokens.select(kept)
        self.num_supervised = num_supervised[kept]
        self.num_tokens = np.asarray(self._tokens.with_format("numpy")["num_tokens"][:], dtype=np.int64)
        self.reports: list[SetReport] = [report_of(data) for data in sets]
        self.mixture = Mixture(np.diff(self._ends, prepend=0).tolist(), weights)
        identity = [[data.digest for data in sets], weights]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_truncated(self) -> int:
        """Samples that were cut at max_length and still have something to learn."""
        return sum(report.num_truncated for report in self.reports)

    @property
    def num_dropped(self) -> int:
        """Rows left out because nothing to learn was left of them."""
        return sum(report.num_dropped for report in self.reports)

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where not supervised) of one sample, of the same length."""
        row = self._tokens[int(index)]
        return row["input_ids"], labels_of(row["input_ids"], row["supervised"])

    def messages(self, index: int) -> list[Message]:
        """The conversation as far as the sample holds it, uncut; empty where the row is plain text."""
        messages: list[Message] = json.loads(self._rows[int(index)]["messages"])
        return messages[: self._tokens[int(index)]["num_messages"]]

    def tools(self, index: int) -> list[dict[str, Any]] | None:
        """Those of the conversation."""
        tools: list[dict[str, Any]] | None = json.loads(self._rows[int(index)]["tools"])
        return tools

    def place(self, index: int) -> tuple[str, int]:
        """Name of the source that a sample came from, and its row there."""
        name = self._names[int(np.searchsorted(self._ends, index, side="right"))]
        return name, int(self._rows[int(index)]["row"])

    def origin(self, index: int) -> str:
        """The same in words."""
        name, row = self.place(index)
        return f"{name}, row {row}"


def load_instructions(
    sources: Sequence[DataSource],
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    progress: bool = False,
    num_embeddings: int | None = None,
) -> InstructionDataset:
    """Read, check and tokenise data, or take the result of an earlier time from the cache of `datasets`.

    May be called on every rank at once: the first process of a machine does the work under a file lock and the others
    wait for its file. Every rank gets the same rows or the same error.

    Args:
        sources: joined in this order, or mixed by their weights
        key: recipe key that names the sources, for messages
        tokenizer: a fast tokenizer with a chat template
        max_length, on_bad_row, num_proc, progress, num_embeddings: see `TokeniseOptions`

    Raises:
        DataError: no source, a wrong source or row, or nothing left to learn within max_length
        ModelError: the tokenizer or its chat template cannot be used
    """
    if not sources:
        raise DataError(f"{key} names no file. Add one, e.g. {key}: [{{path: data/train.jsonl}}].")
    paths = [source.path for source in sources]
    if "" in paths:
        raise DataError(f"{key}[{paths.index('')}].path is empty, but it must name a file, e.g. data/train.jsonl.")
    options = TokeniseOptions(max_length, on_bad_row, num_proc, progress, num_embeddings)
    sets = [tokenised_set(source, tokenizer, options) for source in sources]
    weights = [weight for source in sources if (weight := source.weight) is not None] or None
    dataset = InstructionDataset(sets, weights)
    for place, weight in enumerate(weights or [None] * len(sets)):
        _check_size(dataset, place, weight, key, max_length)
    return dataset


def _check_size(dataset: InstructionDataset, place: int, weight: float | None, key: str, max_length: int) -> None:
    """A set has something to learn, and its weight gives it at least one place of an epoch."""
    mixture, report = dataset.mixture, dataset.reports[place]
    if report.num_skipped == report.num_rows:
        raise DataError(f"{key}[{place}]: every row of {report.name} is wrong: {' '.join(report.problems)}")
    if not mixture.sizes[place]:
        raise DataError(
            f"{key}[{place}]: none of the {report.num_rows} rows of {report.name} has a token to learn within "
            f"data.max_length = {max_length}. Raise data.max_length or shorten the prompts."
        )
    if not mixture.quotas[place]:
        raise DataError(
            f"{key}[{place}].weight is {weight}, but it must be large enough for one of the {mixture.num_places} "
            f"samples of an epoch. Raise it, or take {report.name} out."
        )
