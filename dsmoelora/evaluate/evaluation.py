"""An evaluation from its first row to its summary, its batches dealt out over ranks with a whole model each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dsmoelora.adapters.folder_files import WEIGHTS_FILE, read_adapter_config
from dsmoelora.errors import bad_value
from dsmoelora.evaluate.items import Item, Items, given_answer
from dsmoelora.evaluate.reader import Reader, Tokens, in_batches
from dsmoelora.evaluate.routing import RoutingCount, is_routed
from dsmoelora.evaluate.scores import SCORES, Outcome, ScoreName
from dsmoelora.evaluate.store import DIGEST, Store
from dsmoelora.evaluate.summary import summary_of
from dsmoelora.model import Trained
from dsmoelora.model.folder import base_digest
from dsmoelora.parallel import comm
from dsmoelora.signs_of_life.heartbeat import Heartbeat, Phase
from dsmoelora.signs_of_life.meter import Meter

Stage = Literal["base", "adapter"]
_STAGES: tuple[Stage, ...] = ("base", "adapter")


@dataclass(frozen=True)
class Asked:
    """What is evaluated, and how.

    Args:
        trained: the adapter and its base
        score: name of the score
        items: what is scored
        tokenizer: of the adapter
        stages: who is asked
        batch_size: rows of a batch
        max_new_tokens: of a generated answer at most
    """

    trained: Trained
    score: ScoreName
    items: Items
    tokenizer: PreTrainedTokenizerBase
    stages: tuple[Stage, ...] = _STAGES
    batch_size: int = 8
    max_new_tokens: int = 256

    def identity(self) -> dict[str, Any]:
        """What must be the same for a later start to go on; what a person can read comes first.

        Raises:
            ModelError: the base cannot be read
        """
        with (self.trained.adapter / WEIGHTS_FILE).open("rb") as file:
            adapter = hashlib.file_digest(file, "sha256")
        described = read_adapter_config(self.trained.adapter) | {"base_model_name_or_path": None}
        adapter.update(json.dumps(described, sort_keys=True).encode())
        rows = hashlib.sha256()
        for item in self.items.items:
            prompt = None if item.prompt is None else [item.prompt.messages, item.prompt.tools]
            rows.update(json.dumps([item.path, item.row, prompt, item.wanted, item.texts, item.answers]).encode())
        identity: dict[str, Any] = {
            "score": self.score,
            "num_rows": len(self.items.items),
            "batch_size": self.batch_size,
            "quantize": self.trained.quantize,
        }
        if self.score in ("exact", "number"):
            identity["max_new_tokens"] = self.max_new_tokens
        template = self.tokenizer.get_chat_template().encode()
        digests = {
            "base": base_digest(self.trained.base),
            "adapter": adapter.hexdigest(),
            "data": rows.hexdigest(),
            "tokenizer": hashlib.sha256(template).hexdigest(),
        }
        return identity | {name: DIGEST + digest[:16] for name, digest in digests.items()}


class Evaluation:
    """Everything that is done with one model a rank (all methods are collective).

    Args:
        asked: the same on all ranks
        store: where what is done is kept, opened
        heartbeat: gets a beat for every forward pass
        console: of rank 0; silent on the others
    """

    def __init__(self, asked: Asked, store: Store, heartbeat: Heartbeat, console: Console) -> None:
        self._asked, self._store, self._heartbeat, self._console = asked, store, heartbeat, console
        items = asked.items.items
        # Longest first: what does not fit into memory fails at once, and neighbours take ranks about as long.
        order = sorted(range(len(items)), key=lambda place: -items[place].num_tokens)
        self._batches = in_batches(order, asked.batch_size)
        self._model: Any = None
        self._loaded: Stage | None = None

    def run(self) -> list[dict[str, Any]]:
        """Score all rows, as far as that has not been done before, and write results and summary.

        Returns:
            the summary, see `summary_of`
        """
        for stage in self._asked.stages:
            self._score(stage)
        summary: list[dict[str, Any]] = comm.together(lambda: self._conclude() if comm.rank() == 0 else [])
        return comm.broadcast_object(summary)

    def routing(self) -> dict[str, Any]:
        """Which experts read the rows with the answers that the adapter gave; see `RoutingCount.report`.

        Raises:
            ConfigError: there is nothing to choose for a router
        """
        outcomes = comm.together(lambda: self._outcomes("adapter"))
        reader = self._reader("adapter")
        if not is_routed(reader.model):
            raise bad_value("--routing", True, "left out: this adapter has one expert a layer", "Drop it.")
        groups = ("right answers", "wrong answers") if SCORES[self._asked.score].shares else ("all rows",)
        count = RoutingCount(reader.model, groups)

        def read(batch: int) -> None:
            places = self._batches[batch]
            for number, group in enumerate(groups):
                chosen = [place for place in places if number == (not outcomes[place]["score"]) or len(groups) == 1]
                count.count(reader, group, [self._as_answered(place, outcomes[place]) for place in chosen])

        self._deal("routing", range(len(self._batches)), read)
        return count.report()

    def _score(self, stage: Stage) -> None:
        """Ask one of the two, batch by batch."""
        done = self._done(stage)
        rest = [batch for batch in range(len(self._batches)) if batch not in done]
        if not rest:
            return
        reader, score = self._reader(stage), SCORES[self._asked.score]

        def ask(batch: int) -> None:
            items = [self._asked.items.items[place] for place in self._batches[batch]]
            self._store.add(stage, batch, score.outcomes(reader, items), comm.rank())

        self._deal(stage, rest, ask)

    def _deal(self, what: str, batches: Sequence[int], do: Callable[[int], None]) -> None:
        """Every rank does its share; who fails stops all, after the batch they are at."""
        total = self._tokens(range(len(self._batches)))
        done, num_rows = total - self._tokens(batches), sum(len(batch) for batch in self._batches)
        meter = Meter(self._console, total, done, what) if comm.rank() == 0 else None
        world_size, rank = comm.world_size(), comm.rank()
        left = sum(len(self._batches[batch]) for batch in batches)
        self._heartbeat.enter(Phase.EVALUATE, num_rows - left)
        try:
            for round_ in in_batches(batches, world_size):
                own = round_[rank] if rank < len(round_) else None
                comm.together(partial(do, own) if own is not None else lambda: None)
                done, left = done + self._tokens(round_), left - sum(len(self._batches[batch]) for batch in round_)
                self._heartbeat.enter(Phase.EVALUATE, num_rows - left)
                if meter is not None:
                    meter.update(done, f"{what} {num_rows - left:,}/{num_rows:,} rows")
        finally:
            if meter is not None:
                meter.stop()

    def _tokens(self, batches: Sequence[int]) -> int:
        """What batches cost, about."""
        more = self._asked.max_new_tokens if self._asked.score in ("exact", "number") else 0
        items = self._asked.items.items
        return sum(
            (items[place].num_tokens + more) * max(1, len(items[place].texts))
            for batch in batches
            for place in self._batches[batch]
        )

    def _reader(self, stage: Stage) -> Reader:
        """The base as it came, then the adapter on it, or on its own."""
        trained = self._asked.trained
        if stage != self._loaded:
            self._heartbeat.enter(Phase.BUILD, 0)
            if stage == "adapter" and trained.has_own_base:
                self._model = None  # two need not be there at once
            load = trained.load_base if stage == "base" else partial(trained.load, self._model)
            known, self._model, self._loaded = self._model, comm.together(load), stage
            if self._model is not known:
                self._model.register_forward_pre_hook(lambda *_: self._heartbeat.beat())
        return Reader(self._model, self._asked.tokenizer, self._asked.batch_size, self._asked.max_new_tokens)

    def _done(self, stage: Stage) -> set[int]:
        """Batches that were finished before, the same on all ranks: by what rank 0 sees."""
        found = comm.together(lambda: sorted(self._store.finished(stage)) if comm.rank() == 0 else [])
        return set(comm.broadcast_object(found))

    def _outcomes(self, stage: Stage) -> list[Outcome]:
        """What came of each item.

        Raises:
            ConfigError: what other ranks wrote is not there
        """
        finished = self._store.finished(stage)
        found: dict[int, Outcome] = {}
        for batch, places in enumerate(self._batches):
            if batch not in finished:
                remedy = "Name a folder that all ranks see, on a file system that the nodes share."
                raise bad_value("--out", str(self._store.folder), "where all ranks write", remedy)
            found.update(zip(places, finished[batch], strict=True))
        return [found[place] for place in range(len(found))]

    def _conclude(self) -> list[dict[str, Any]]:
        """Put the ranks' parts together (rank 0), with what an earlier start has asked the other of the two."""
        asked = self._asked
        known = [stage for stage in _STAGES if len(self._store.finished(stage)) == len(self._batches)]
        told = [stage for stage in _STAGES if stage in asked.stages or stage in known]
        stages: dict[str, list[Outcome]] = {stage: self._outcomes(stage) for stage in told}
        summary = summary_of(SCORES[asked.score], asked.items.items, stages)
        described = {"adapter_folder": str(asked.trained.adapter), **asked.identity(), "scores": summary}
        self._store.write_results(_rows(asked.items.items, stages), described)
        return summary

    def _as_answered(self, place: int, outcome: Outcome) -> Tokens:
        """An item with the answer that was given."""
        item = self._asked.items.items[place]
        if not item.texts:
            assert item.prompt is not None, "what is answered has a prompt"
            return given_answer(self._asked.tokenizer, item.prompt, outcome["answer"])
        return item.texts[item.answers.index(outcome["answer"]) if item.answers else 0]


def _rows(items: Sequence[Item], stages: dict[str, list[Outcome]]) -> Iterator[dict[str, Any]]:
    """A line for each item: where it is from, what was asked and wanted, and what came of it."""
    for place, item in enumerate(items):
        asked = None if item.prompt is None else item.prompt.messages[-1]["content"]
        row: dict[str, Any] = {"data": item.path, "row": item.row, "prompt": asked, "wanted": item.wanted}
        if "adapter" in stages:
            row |= stages["adapter"][place]
        yield row | ({"base": stages["base"][place]} if "base" in stages else {})
