"""The section `data`: what is learned from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dsmoelora.config.checks import expanded, require


@dataclass
class DataSource:
    """One set of rows; see docs/data.md for files and formats.

    Args:
        path: JSON, JSONL, CSV or Parquet file, folder written by `save_to_disk`, or name of a dataset on the hub
        weight: share of the training samples that come from here, relative to the other sets' weights; `null` for
            all sets joins them, each row once an epoch
        format: how a conversation is written in columns; `auto` finds out from the columns of the first row
        fields: where the format's columns have other names in the file, e.g. `{instruction: question}`
        answer_is: of multiple choice: the one way to read `answer`, where it may be read in several: a number counted
            from 0, a letter (or the label), or the text of a choice; `null` reads all three, and refuses what they
            read differently
        split: part of a saved folder or hub dataset that has several
        subset: configuration of a hub dataset that has several
    """

    path: str = ""
    weight: float | None = None
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "multiple_choice", "text"] = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    answer_is: Literal["index", "letter", "text"] | None = None
    split: str | None = None
    subset: str | None = None


@dataclass
class DataConfig:
    """What is learned from.

    Args:
        train: training sets, joined or mixed by their weights
        eval: held-out sets, joined
        max_length: tokens of a sample; what is longer is cut at the end
        on_bad_row: `error` stops at the first wrong row, `skip` leaves wrong rows out and reports how many
        num_proc: processes that tokenise; `null` for as many as there are cores and rows for
        packing: let training samples share rows of `max_length` tokens, without seeing each other
        streaming: read and tokenise the training sets while they are learned from: nothing is kept or cached, and
            rows are shuffled within blocks alone
        shuffle_buffer: with `streaming`: rows of a block; `null` means 10,000, and 1 keeps the sets' own order
    """

    train: list[DataSource] = field(default_factory=list)
    eval: list[DataSource] = field(default_factory=list)
    max_length: int = 512
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int | None = None
    packing: bool = False
    streaming: bool = False
    shuffle_buffer: int | None = None

    def __post_init__(self) -> None:
        for key, sources in (("train", self.train), ("eval", self.eval)):
            for place, source in enumerate(sources):
                source.path = expanded(f"data.{key}[{place}].path", source.path)
        require(self.max_length >= 2, "data.max_length", self.max_length, "2 or more", "Common values: 512 to 4096.")
        ok = self.num_proc is None or self.num_proc >= 1
        require(ok, "data.num_proc", self.num_proc, "1 or more, or null", "null chooses by cores and rows.")
        self._check_streaming()
        self._check_weights()
        self._check_answers()

    @property
    def block_size(self) -> int:
        """Rows of a streamed set that are shuffled with each other."""
        return 10_000 if self.shuffle_buffer is None else self.shuffle_buffer

    def _check_streaming(self) -> None:
        size = self.shuffle_buffer
        require(size is None or size >= 1, "data.shuffle_buffer", size, "1 or more, or null", "null means 10,000.")
        if not self.streaming:
            remedy = "Drop it, or set data.streaming to true."
            require(size is None, "data.shuffle_buffer", size, "null without data.streaming", remedy)
            return
        reason = "false with data.streaming, which cannot know beforehand which samples fit together"
        require(not self.packing, "data.packing", self.packing, reason, "Set one of the two to false.")
        reason = "null with data.streaming, where every rank tokenises its own rows"
        require(self.num_proc is None, "data.num_proc", self.num_proc, reason, "Drop it.")

    def _check_weights(self) -> None:
        weights = [source.weight for source in self.train]
        for place, weight in enumerate(weights):
            key = f"data.train[{place}].weight"
            ok = weight is None or 0 < weight < math.inf
            require(ok, key, weight, "above 0", "Take the set out if it is to have no part.")
            ok = (weight is None) == (weights[0] is None)
            require(ok, key, weight, "given for all sets or for none", "Shares are relative, e.g. 3 and 1.")
        for place, source in enumerate(self.eval):
            key = f"data.eval[{place}].weight"
            require(source.weight is None, key, source.weight, "left out: every held-out row counts once", "Drop it.")

    def _check_answers(self) -> None:
        for key, sources in (("train", self.train), ("eval", self.eval)):
            for place, source in enumerate(sources):
                ok = source.answer_is is None or source.format in ("auto", "multiple_choice")
                allowed = f"null with format {source.format}: nothing reads it"
                require(ok, f"data.{key}[{place}].answer_is", source.answer_is, allowed, "Drop it.")
