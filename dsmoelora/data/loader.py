"""Which samples an optimizer step sees, and how they are dealt out to ranks and micro-batches.

The samples form one endless stream: epoch 0, epoch 1, and so on, each from (seed, epoch) alone (see `mixing.py`).
Global batch n is the places [n * batch_size, (n + 1) * batch_size) of it. So what a step learns from depends on the
seed and its number alone, not on ranks, accumulation or where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsmoelora.data.dataset import IGNORED, InstructionDataset
from dsmoelora.data.mixing import Mixture


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank puts through the model at once: B sequences, padded on the right to S tokens.

    Args:
        input_ids: (B, S) int64
        attention_mask: (B, S) int64, 1 for tokens, 0 for padding
        labels: (B, S) int64, the tokens themselves, not shifted; -100 where not supervised
        sequence_ids: (B,) int64, the number of the sequence in the whole run (in an evaluation: of the row)
        num_supervised_global: targets that enter the loss in the whole global batch, over all ranks and micro-batches
            (in an evaluation: in the whole dataset)
        num_tokens_global: real tokens of the same, padding left out
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    num_supervised_global: int
    num_tokens_global: int

    @property
    def num_supervised_local(self) -> int:
        """Targets of this micro-batch alone that enter the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def first_supervised(self) -> int:
        """The first place in which some sequence has a target that enters the loss; S - 1 where there is none."""
        columns = (self.labels[:, 1:] != IGNORED).any(0).nonzero()
        return int(columns[0]) + 1 if len(columns) else self.labels.shape[1] - 1

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            sequence_ids=self.sequence_ids.to(device),
        )


@dataclass(frozen=True)
class _Place:
    """One row of a micro-batch: which sample, under which sequence id, and whether it counts."""

    sample: int
    sequence_id: int
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
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of optimizer step `start_step`, `start_step + 1`, and so on without end.

    Args:
        dataset: samples
        seed: decides the order, together with the epoch
        batch_size: sequences of all ranks per step, a multiple of `micro_batch_size * world_size`
        micro_batch_size: sequences of one rank per forward
        rank, world_size: which share is dealt out
        pad_token_id: fills the shorter rows
        start_step: where to begin; costs the same wherever that is
    """
    assert batch_size % (micro_batch_size * world_size) == 0, (batch_size, micro_batch_size, world_size)
    stream = _SampleStream(dataset.mixture, seed)
    step = start_step
    while True:
        first = step * batch_size
        samples = stream.samples(first, batch_size)
        totals = int(dataset.num_supervised[samples].sum()), int(dataset.num_tokens[samples].sum())
        places = [_Place(sample, first + i) for i, sample in enumerate(samples.tolist())]
        shares = _deal(_by_length(dataset, places), micro_batch_size, rank, world_size)
        yield [_collate(dataset, share, pad_token_id, totals) for share in shares]
        step += 1


def eval_micro_batches(
    dataset: InstructionDataset, *, micro_batch_size: int, rank: int, world_size: int, pad_token_id: int
) -> list[MicroBatch]:
    """This rank's share of the whole dataset, each row once over all ranks.

    Every rank gets the same number of micro-batches of the same shape (B), because a forward under ZeRO-3 is
    collective: where rows run out, one is repeated with all labels -100.
    """
    places = _by_length(dataset, [_Place(i, i) for i in range(len(dataset))])
    whole = len(places) - len(places) % (micro_batch_size * world_size)
    shares = _deal(places[:whole], micro_batch_size, rank, world_size)
    if rest := places[whole:]:
        per_rank = -(-len(rest) // world_size)
        filler = replace(rest[-1], counts=False)
        filled = rest + [filler] * (per_rank * world_size - len(rest))
        shares += _deal(filled, per_rank, rank, world_size)
    totals = int(dataset.num_supervised.sum()), int(dataset.num_tokens.sum())
    return [_collate(dataset, share, pad_token_id, totals) for share in shares]


class _SampleStream:
    """The endless stream of epochs; keeps the one it used last."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._mixture = mixture
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def samples(self, first: int, count: int) -> np.ndarray:
        """(count,) sample indices at the places [first, first + count)."""
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


def _by_length(dataset: InstructionDataset, places: list[_Place]) -> list[_Place]:
    """Longest first, so that a step that does not fit into memory fails at its beginning; ties keep their order."""
    return sorted(places, key=lambda place: -int(dataset.num_tokens[place.sample]))


def _deal(places: list[_Place], micro_batch_size: int, rank: int, world_size: int) -> list[list[_Place]]:
    """This rank's micro-batches: neighbours run together, at the same time on all ranks, so that nobody waits long."""
    round_size = micro_batch_size * world_size
    begin = rank * micro_batch_size
    return [places[i + begin : i + begin + micro_batch_size] for i in range(0, len(places), round_size)]


def _collate(
    dataset: InstructionDataset, places: Sequence[_Place], pad_token_id: int, totals: tuple[int, int]
) -> MicroBatch:
    samples = [dataset.sample(place.sample) for place in places]
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for i, (place, (ids, targets)) in enumerate(zip(places, samples, strict=True)):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        if place.counts:
            labels[i, : len(ids)] = torch.tensor(targets)
    sequence_ids = torch.tensor([place.sequence_id for place in places], dtype=torch.int64)
    return MicroBatch(input_ids, attention_mask, labels, sequence_ids, *totals)
