"""Which samples an optimizer step sees, and how they are dealt out to ranks and micro-batches.

A row holds one sample, or with packing as many as fit. The rows form one endless stream: epoch 0, epoch 1, and so on,
each from (seed, epoch) alone (see `mixing.py`). Global batch n is the places [n * batch_size, (n + 1) * batch_size) of
it. So what a step learns from depends on the seed and its number alone, not on ranks, accumulation or where a run was
resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch

from dsmoelora.config import Recipe
from dsmoelora.data.dataset import IGNORED, InstructionDataset
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.packing import Packing


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank puts through the model at once: B rows, padded on the right to S tokens.

    Args:
        input_ids: (B, S) int64
        attention_mask: (B, S) int64, 1 for tokens, 0 for padding
        labels: (B, S) int64, the tokens themselves, not shifted; -100 where not supervised
        sequence_ids: (B,) int64, the number of the sequence in the whole run (in an evaluation: of the sample); where
            rows are packed (B, S), of every token
        num_supervised_global: targets that enter the loss in the whole global batch, over all ranks and micro-batches
            (in an evaluation: in the whole dataset)
        num_tokens_global: real tokens of the same, padding left out
        position_ids: where rows are packed (B, S) int64, the place of each token in its sample, from 0; otherwise None
        counts: (B,) bool, False for rows that only keep the ranks in step; None where all rows count
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    num_supervised_global: int
    num_tokens_global: int
    position_ids: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def with_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same with `fn` of every tensor in its place."""
        tensors = {name: fn(one) for name, one in vars(self).items() if isinstance(one, torch.Tensor)}
        return replace(self, **cast(dict[str, Any], tensors))

    @property
    def real_tokens(self) -> torch.Tensor:
        """(B, S) bool: tokens of samples. The model sees those of a row that does not count too; nobody else does."""
        real = self.attention_mask.bool()
        return real if self.counts is None else real & self.counts.unsqueeze(-1)

    @property
    def num_supervised_local(self) -> int:
        """Targets of this micro-batch alone that enter the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in its row each target is predicted, and the target: both (B, P), in the order of the rows.

        P is the most targets of any row, and 1 at least. Rows with fewer are filled up: places whose target is -100.
        """
        labels = self.labels[:, 1:]
        is_target = labels != IGNORED
        num_places = max(1, int(is_target.sum(1).max()))
        places = (~is_target).int().argsort(dim=1, stable=True)[:, :num_places]
        return places, labels.gather(1, places)


class Samples(Protocol):
    """Tokenised samples by number."""

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where not supervised), of the same length."""


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch: samples, the sequence id of the first (the next ones follow), whether they count."""

    samples: np.ndarray
    first_sequence_id: int
    num_tokens: int
    counts: bool = True


def train_steps(
    dataset: InstructionDataset,
    *,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    start_step: int = 0,
    packing: Packing | None = None,
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of optimizer step `start_step`, `start_step + 1`, and so on without end.

    Args:
        dataset: samples
        seed: decides the order, together with the epoch
        batch_size: rows of all ranks per step, a multiple of `micro_batch_size * world_size`
        micro_batch_size: rows of one rank per forward
        rank, world_size: which share is dealt out
        pad_token_id: fills the shorter rows
        start_step: where to begin; costs the same wherever that is
        packing: which samples share a row; None gives each a row of its own
    """
    assert batch_size % (micro_batch_size * world_size) == 0, (batch_size, micro_batch_size, world_size)
    stream = _RowStream(dataset.mixture if packing is None else packing.mixture, seed)
    step = start_step
    while True:
        first = step * batch_size
        rows = [
            _row(dataset, packing, number, first + place)
            for place, number in enumerate(stream.rows(first, batch_size).tolist())
        ]
        samples = np.concatenate([row.samples for row in rows])
        totals = int(dataset.num_supervised[samples].sum()), int(dataset.num_tokens[samples].sum())
        shares = _deal(by_length(rows), micro_batch_size, rank, world_size)
        packed = packing is not None
        yield [collate(dataset, share, pad_token_id, totals, packed=packed) for share in shares]
        step += 1


def _row(dataset: InstructionDataset, packing: Packing | None, number: int, place: int) -> Row:
    """Row `number` of an epoch at a place of the stream."""
    if packing is None:
        return Row(np.array([number]), place, int(dataset.num_tokens[number]))
    samples = packing.row(number)
    # No row has more samples than tokens, so no two samples of a run get the same sequence id.
    return Row(samples, place * packing.capacity, int(dataset.num_tokens[samples].sum()))


def first_micro_batches(
    dataset: InstructionDataset,
    *,
    num_rows: int,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    packing: Packing | None = None,
) -> list[MicroBatch]:
    """This rank's share of the rows that training begins with, as of `eval_micro_batches`.

    Args:
        dataset, seed, packing: as of `train_steps`
        num_rows: how many, whatever the batch size of a step
        micro_batch_size, rank, world_size, pad_token_id: as of `train_steps`
    """
    numbers = _RowStream(dataset.mixture if packing is None else packing.mixture, seed).rows(0, num_rows)
    rows = [_row(dataset, packing, number, place) for place, number in enumerate(numbers.tolist())]
    return _once(dataset, rows, micro_batch_size, rank, world_size, pad_token_id, packed=packing is not None)


def eval_micro_batches(
    dataset: InstructionDataset, *, micro_batch_size: int, rank: int, world_size: int, pad_token_id: int
) -> list[MicroBatch]:
    """This rank's share of the whole dataset, each row once over all ranks.

    Every rank gets the same number of micro-batches of the same shape (B), because a forward under ZeRO-3 is
    collective: where rows run out, one is repeated with all labels -100.
    """
    rows = [_row(dataset, None, i, i) for i in range(len(dataset))]
    return _once(dataset, rows, micro_batch_size, rank, world_size, pad_token_id, packed=False)


def _once(
    dataset: InstructionDataset,
    rows: list[Row],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    *,
    packed: bool,
) -> list[MicroBatch]:
    rows = by_length(rows)
    whole = len(rows) - len(rows) % (micro_batch_size * world_size)
    shares = _deal(rows[:whole], micro_batch_size, rank, world_size)
    if rest := rows[whole:]:
        per_rank = -(-len(rest) // world_size)
        filler = replace(rest[-1], counts=False)
        filled = rest + [filler] * (per_rank * world_size - len(rest))
        shares += _deal(filled, per_rank, rank, world_size)
    samples = np.concatenate([row.samples for row in rows])
    totals = int(dataset.num_supervised[samples].sum()), int(dataset.num_tokens[samples].sum())
    return [collate(dataset, share, pad_token_id, totals, packed=packed) for share in shares]


def padding_share(num_tokens: np.ndarray, mixture: Mixture, seed: int, batch_size: int, micro_batch_size: int) -> float:
    """Share of the tokens that go through the model in the first epoch which are padding, for any number of ranks.

    Args:
        num_tokens: (num_rows,) tokens of each row
        mixture: of the rows
        seed, batch_size, micro_batch_size: as in `train_steps`
    """
    num_steps = -(-mixture.num_places // batch_size)
    rows = _RowStream(mixture, seed).rows(0, num_steps * batch_size)
    tokens = -np.sort(-num_tokens[rows].reshape(num_steps, batch_size), axis=1)
    longest = tokens.reshape(-1, micro_batch_size)[:, 0]
    return 1.0 - float(tokens.sum() / (longest.sum() * micro_batch_size))


def packing_report(dataset: InstructionDataset, packing: Packing, recipe: Recipe) -> str:
    """One line: how many rows there are, and how much of the padding they save."""
    train = recipe.train
    packed, apart = (
        padding_share(num_tokens, mixture, recipe.run.seed, train.batch_size, train.micro_batch_size)
        for num_tokens, mixture in (
            (packing.sums(dataset.num_tokens), packing.mixture),
            (dataset.num_tokens, dataset.mixture),
        )
    )
    return (
        f"Packed into {len(packing):,} rows of {packing.capacity:,} tokens: {packed:.1%} of what is computed is "
        f"padding; in rows of their own it would be {apart:.1%}"
    )


class _RowStream:
    """The endless stream of epochs; keeps the one it used last."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._mixture = mixture
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def rows(self, first: int, count: int) -> np.ndarray:
        """(count,) numbers of rows at the places [first, first + count)."""
        parts = []
        while count:
            epoch, begin = divmod(first, self._mixture.num_places)
            part = self._of_epoch(epoch)[begin : begin + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._mixture.epoch(self._seed, epoch)
        return self._order


def by_length(rows: list[Row]) -> list[Row]:
    """Longest first, so that a step that does not fit into memory fails at its beginning; ties keep their order."""
    return sorted(rows, key=lambda row: -row.num_tokens)


def _deal(rows: list[Row], micro_batch_size: int, rank: int, world_size: int) -> list[list[Row]]:
    """This rank's micro-batches: neighbours run together, at the same time on all ranks, so that nobody waits long."""
    round_size = micro_batch_size * world_size
    begin = rank * micro_batch_size
    return [rows[i + begin : i + begin + micro_batch_size] for i in range(0, len(rows), round_size)]


def collate(
    samples: Samples, rows: list[Row], pad_token_id: int, totals: tuple[int, int], *, packed: bool
) -> MicroBatch:
    """Rows of samples as tensors, in pinned memory where there is an accelerator: copies out of it need no waiting.

    Args:
        samples: what the rows' numbers mean
        rows: of one forward pass, longest first or not
        pad_token_id: fills the shorter rows
        totals: supervised targets and tokens of the global batch
        packed: whether a row may hold several samples
    """
    shape = (len(rows), max(row.num_tokens for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask, sequence_ids, position_ids = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        begin = 0
        for sequence_id, sample in enumerate(row.samples.tolist(), row.first_sequence_id):
            ids, targets = samples.sample(sample)
            end = begin + len(ids)
            input_ids[i, begin:end] = torch.tensor(ids)
            attention_mask[i, begin:end] = 1
            if row.counts:  # the first token of a sample is nobody's target: before it stands another sample
                labels[i, begin + 1 : end] = torch.tensor(targets[1:], dtype=torch.int64)
            sequence_ids[i, begin:] = sequence_id
            position_ids[i, begin:] = torch.arange(shape[1] - begin)
            begin = end
        position_ids[i, begin:] = torch.arange(shape[1] - begin)  # padding is a sample of its own
    counts = None if all(row.counts for row in rows) else torch.tensor([row.counts for row in rows])
    if packed:
        batch = MicroBatch(input_ids, attention_mask, labels, sequence_ids, *totals, position_ids, counts)
    else:
        batch = MicroBatch(input_ids, attention_mask, labels, sequence_ids[:, 0], *totals, counts=counts)
    return batch.with_tensors(torch.Tensor.pin_memory) if torch.accelerator.is_available() else batch
