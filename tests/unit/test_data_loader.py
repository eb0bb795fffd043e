from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from dsmoelora.config import DataSource
from dsmoelora.data import (
    InstructionDataset,
    MicroBatch,
    Packing,
    eval_micro_batches,
    first_micro_batches,
    load_instructions,
    train_steps,
)
from dsmoelora.data.loader import padding_share
from dsmoelora.data.mixing import Mixture
from dsmoelora.data.packing import pack_sets
from tests.helpers import tiny_tokenizer

PAD = 0
NUM_ROWS = 23  # shares no factor with the batch sizes below: epochs end in the middle of a batch


@pytest.fixture(scope="module", params=[None, (3.0, 1.0)], ids=["joined", "weighted"])
def any_dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InstructionDataset:
    """One set, or two that are mixed by weights."""
    folder = tmp_path_factory.mktemp("loader")
    sources = []
    for name, weight in zip("ab", request.param or (None,), strict=False):
        rows = [{"instruction": name * (1 + i * 7 % 13), "output": "a" * (1 + i * 5 % 11)} for i in range(NUM_ROWS)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        sources.append(DataSource(str(folder / f"{name}.jsonl"), weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        return load_instructions(sources, "data.train", tiny_tokenizer(folder), 100)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> InstructionDataset:
    folder = tmp_path_factory.mktemp("loader")
    rows = [{"instruction": "q" * (1 + i * 7 % 13), "output": "a" * (1 + i * 5 % 11)} for i in range(NUM_ROWS)]
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        return load_instructions([DataSource(str(folder / "a.jsonl"))], "data.train", tiny_tokenizer(folder), 100)


def steps(
    dataset: InstructionDataset,
    count: int,
    *,
    batch_size: int = 8,
    micro: int = 2,
    world_size: int = 1,
    start: int = 0,
    packing: Packing | None = None,
) -> list[list[MicroBatch]]:
    """`count` steps, each with the micro-batches of all ranks: one round after the other, rank by rank."""
    ranks = [
        islice(
            train_steps(
                dataset,
                seed=3,
                batch_size=batch_size,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
                pad_token_id=PAD,
                start_step=start,
                packing=packing,
            ),
            count,
        )
        for rank in range(world_size)
    ]
    return [[batch for turn in zip(*step, strict=True) for batch in turn] for step in zip(*ranks, strict=True)]


def rows_of(batches: list[MicroBatch]) -> dict[int, tuple[list[int], list[int]]]:
    """Sequence id -> tokens and labels without the padding, whether samples have rows of their own or share them."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for batch in batches:
        if batch.position_ids is not None:
            found |= _samples_of(batch)
            continue
        for i, sequence in enumerate(batch.sequence_ids.tolist()):
            length = int(batch.attention_mask[i].sum())
            assert sequence not in found
            found[sequence] = (batch.input_ids[i, :length].tolist(), batch.labels[i, :length].tolist())
    return found


def _samples_of(batch: MicroBatch) -> dict[int, tuple[list[int], list[int]]]:
    """The samples of packed rows, as `rows_of` has them; a sample begins wherever the positions do."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    assert batch.position_ids is not None
    columns = (batch.position_ids, batch.sequence_ids, batch.input_ids, batch.labels, batch.attention_mask)
    for row in zip(*(tensor.tolist() for tensor in columns), strict=True):
        for place, sequence, token, label, is_real in zip(*row, strict=True):
            if not is_real:
                continue
            ids, labels = found.setdefault(sequence, ([], []))
            assert place == len(ids), "positions count from 0 in every sample"
            ids.append(token)
            labels.append(label)
    return found


def test_padding_is_on_the_right_and_counts_nothing(dataset: InstructionDataset) -> None:
    padded = 0
    for batch in steps(dataset, 1, batch_size=8, micro=8)[0]:
        for name in ("input_ids", "attention_mask", "labels"):
            tensor = getattr(batch, name)
            assert tensor.dtype == torch.int64 and tensor.shape == batch.input_ids.shape
        lengths = batch.attention_mask.sum(1)
        assert int(lengths.max()) == batch.input_ids.shape[1]
        for i, length in enumerate(lengths.tolist()):
            assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
            assert (batch.input_ids[i, length:] == PAD).all() and (batch.labels[i, length:] == -100).all()
            padded += batch.input_ids.shape[1] - length
    assert padded > 0


def test_rows_are_the_samples(dataset: InstructionDataset) -> None:
    (first_epoch,) = steps(dataset, 1, batch_size=NUM_ROWS, micro=1)
    expected = sorted(dataset.sample(i) for i in range(NUM_ROWS))
    assert sorted(rows_of(first_epoch).values()) == expected


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batch_does_not_depend_on_ranks_or_accumulation(
    any_dataset: InstructionDataset, world_size: int, micro: int
) -> None:
    for one, other in zip(
        steps(any_dataset, 7), steps(any_dataset, 7, micro=micro, world_size=world_size), strict=True
    ):
        assert rows_of(one) == rows_of(other)
        counts = {batch.num_supervised_global for batch in one + other}
        assert counts == {sum(batch.num_supervised_local for batch in one)}
        assert counts == {sum(batch.num_supervised_local for batch in other)}


def test_sequence_ids_number_the_whole_run(dataset: InstructionDataset) -> None:
    for n, step in enumerate(steps(dataset, 5, world_size=2)):
        assert sorted(rows_of(step)) == list(range(8 * n, 8 * n + 8))


@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_every_sample_once_per_epoch(dataset: InstructionDataset, batch_size: int) -> None:
    num_steps = -(-3 * NUM_ROWS // batch_size)
    stream: dict[int, tuple[list[int], list[int]]] = {}
    for step in steps(dataset, num_steps, batch_size=batch_size):
        stream |= rows_of(step)
    epochs = [[stream[NUM_ROWS * epoch + i] for i in range(NUM_ROWS)] for epoch in range(3)]
    expected = sorted(dataset.sample(i) for i in range(NUM_ROWS))
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [1, 2, 3, 6, 9])
def test_seeking_equals_running_through(any_dataset: InstructionDataset, start: int) -> None:
    for one, other in zip(
        steps(any_dataset, 10, world_size=2)[start:],
        steps(any_dataset, 10 - start, world_size=2, start=start),
        strict=True,
    ):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.sequence_ids, b.sequence_ids) and a.num_supervised_global == b.num_supervised_global


def test_seeking_far_reads_one_step_only(any_dataset: InstructionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = InstructionDataset.sample

    def counted(self: InstructionDataset, index: int) -> tuple[list[int], list[int]]:
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(InstructionDataset, "sample", counted)
    (step,) = steps(any_dataset, 1, start=10**9)
    assert sorted(rows_of(step)) == list(range(8 * 10**9, 8 * 10**9 + 8))
    assert len(reads) == 8


def test_another_seed_gives_another_order(dataset: InstructionDataset) -> None:
    def first(seed: int) -> list[list[int]]:
        arguments = {"batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1, "pad_token_id": PAD}
        return next(train_steps(dataset, seed=seed, **arguments))[0].input_ids.tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert first(-1) != first(0)  # any whole number is a seed


def test_micro_batches_of_one_moment_have_similar_lengths(dataset: InstructionDataset) -> None:
    for step in steps(dataset, 5, batch_size=16, micro=2, world_size=2):
        lengths = [sorted(batch.attention_mask.sum(1).tolist(), reverse=True) for batch in step]
        rounds = [lengths[i] + lengths[i + 1] for i in range(0, len(lengths), 2)]
        # What runs later is never longer than what runs now: the padding is the least that sorting can reach.
        assert all(min(now) >= max(later) for now, later in pairwise(rounds))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 4), (3, 4), (4, 1), (2, 32), (8, 16), (32, 1)])
def test_evaluation_sees_every_row_once_with_equal_work(
    dataset: InstructionDataset, world_size: int, micro: int
) -> None:
    ranks = [
        eval_micro_batches(dataset, micro_batch_size=micro, rank=rank, world_size=world_size, pad_token_id=PAD)
        for rank in range(world_size)
    ]
    shapes = [[len(batch.sequence_ids) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] and max(shape) <= micro for shape in shapes)
    counted = [
        (sequence, batch.input_ids[i][batch.attention_mask[i] == 1].tolist())
        for batches in ranks
        for batch in batches
        for i, sequence in enumerate(batch.sequence_ids.tolist())
        if (batch.labels[i] != -100).any()
    ]
    assert sorted(counted) == [(i, dataset.sample(i)[0]) for i in range(NUM_ROWS)]
    everything = [batch for batches in ranks for batch in batches]
    total = int(dataset.num_supervised.sum())
    assert {batch.num_supervised_global for batch in everything} == {total}
    assert sum(batch.num_supervised_local for batch in everything) == total
    tokens = sum(int(batch.real_tokens.sum()) for batch in everything)
    assert {batch.num_tokens_global for batch in everything} == {tokens} == {int(dataset.num_tokens.sum())}


def test_evaluation_puts_rows_of_similar_length_together(dataset: InstructionDataset) -> None:
    batches = eval_micro_batches(dataset, micro_batch_size=4, rank=0, world_size=1, pad_token_id=PAD)
    lengths = [length for batch in batches for length in batch.attention_mask.sum(1).tolist()]
    assert lengths[:NUM_ROWS] == sorted(dataset.num_tokens.tolist(), reverse=True)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize(("world_size", "micro", "num_rows"), [(1, 4, 16), (2, 4, 5), (3, 2, 13), (4, 4, 3)])
def test_the_first_rows_are_those_that_training_begins_with(
    dataset: InstructionDataset, world_size: int, micro: int, num_rows: int, packed: bool
) -> None:
    """Each once over all ranks, with equal work, whatever the batch size of a step is."""
    packing = packing_of(dataset) if packed else None
    ranks = [
        first_micro_batches(
            dataset,
            num_rows=num_rows,
            seed=3,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
            pad_token_id=PAD,
            packing=packing,
        )
        for rank in range(world_size)
    ]
    assert all([len(b.labels) for b in batches] == [len(b.labels) for b in ranks[0]] for batches in ranks)
    everything = [batch for batches in ranks for batch in batches]
    (step,) = steps(dataset, 1, batch_size=num_rows, micro=num_rows, packing=packing)
    assert rows_of([_counted(batch) for batch in everything]) == rows_of(step)
    assert {(b.num_supervised_global, b.num_tokens_global) for b in everything} == {
        (step[0].num_supervised_global, step[0].num_tokens_global)
    }


def _counted(batch: MicroBatch) -> MicroBatch:
    counts = batch.counts
    return batch if counts is None else batch.with_tensors(lambda rows: rows[counts])


def test_targets_are_counted_as_the_loss_sees_them() -> None:
    labels = torch.tensor([[-100, 5, -100], [7, -100, 8]])  # the 7 is the first token: nothing predicts it
    batch = MicroBatch(labels, labels, labels, torch.arange(2), num_supervised_global=2, num_tokens_global=2)
    assert batch.num_supervised_local == 2


def batch_with(labels: list[list[int]]) -> MicroBatch:
    tensor = torch.tensor(labels)
    return MicroBatch(tensor, torch.ones_like(tensor), tensor, torch.arange(len(labels)), 1, 1)


def test_targets_stand_where_they_are_predicted() -> None:
    places, targets = batch_with([[9, -100, 6, -100, 7], [-100, 5, 4, 3, -100]]).targets()
    assert targets.tolist() == [[6, 7, -100], [5, 4, 3]]  # the 9 is the first token: nothing predicts it
    assert places[0, :2].tolist() == [1, 3] and places[1].tolist() == [0, 1, 2]
    assert places.max() < 5


def test_a_batch_without_targets_has_one_place() -> None:
    places, targets = batch_with([[-100, -100, -100], [4, -100, -100]]).targets()
    assert places.shape == (2, 1) and (targets == -100).all()


CAPACITY = 128  # tokens of a packed row; the samples have 23 to 45


def packing_of(dataset: InstructionDataset) -> Packing:
    return pack_sets(dataset.num_tokens, dataset.mixture, CAPACITY, 3)


def test_packed_rows_hold_every_sample_once_per_epoch(dataset: InstructionDataset) -> None:
    packing = packing_of(dataset)
    assert len(packing) < NUM_ROWS / 2
    expected = sorted(dataset.sample(i) for i in range(NUM_ROWS))
    orders = []
    for epoch in range(2):
        (step,) = steps(dataset, 1, batch_size=len(packing), micro=1, start=epoch, packing=packing)
        assert sorted(rows_of(step).values()) == expected
        orders.append([rows_of(step)[sequence] for sequence in sorted(rows_of(step))])
        for batch in step:
            assert batch.input_ids.shape[1] <= CAPACITY
            assert batch.num_supervised_global == dataset.num_supervised.sum()
    assert orders[0] != orders[1]


def test_padding_of_packed_rows_is_a_sample_of_its_own(dataset: InstructionDataset) -> None:
    padded = 0
    for batch in steps(dataset, 1, batch_size=4, micro=4, packing=packing_of(dataset))[0]:
        assert batch.position_ids is not None
        for i, length in enumerate(batch.attention_mask.sum(1).tolist()):
            rest = batch.input_ids.shape[1] - length
            assert batch.attention_mask[i].tolist() == [1] * length + [0] * rest
            assert batch.position_ids[i, length:].tolist() == list(range(rest))
            assert (batch.input_ids[i, length:] == PAD).all() and (batch.labels[i, length:] == -100).all()
            padded += rest
    assert padded > 0


def test_no_first_token_of_a_packed_sample_is_a_target(dataset: InstructionDataset) -> None:
    for batch in steps(dataset, 1, batch_size=4, micro=4, packing=packing_of(dataset))[0]:
        assert batch.position_ids is not None
        assert (batch.labels[batch.position_ids == 0] == -100).all()
        assert batch.num_supervised_local == batch.num_supervised_global  # all on one rank in one micro-batch


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_packed_global_batch_does_not_depend_on_ranks_or_accumulation(
    any_dataset: InstructionDataset, world_size: int, micro: int
) -> None:
    packing = packing_of(any_dataset)
    seen: set[int] = set()
    for one, other in zip(
        steps(any_dataset, 7, packing=packing),
        steps(any_dataset, 7, micro=micro, world_size=world_size, packing=packing),
        strict=True,
    ):
        assert rows_of(one) == rows_of(other)
        assert not seen & rows_of(one).keys(), "a sequence id came a second time"
        seen |= rows_of(one).keys()
        counts = {batch.num_supervised_global for batch in one + other}
        assert counts == {sum(batch.num_supervised_local for batch in one)}
        assert counts == {sum(batch.num_supervised_local for batch in other)}


@pytest.mark.parametrize("start", [1, 3, 9])
def test_seeking_packed_rows_equals_running_through(any_dataset: InstructionDataset, start: int) -> None:
    packing = packing_of(any_dataset)
    straight = steps(any_dataset, 10, world_size=2, packing=packing)[start:]
    resumed = steps(any_dataset, 10 - start, world_size=2, start=start, packing=packing)
    for one, other in zip(straight, resumed, strict=True):
        for a, b in zip(one, other, strict=True):
            for name in ("input_ids", "attention_mask", "labels", "sequence_ids", "position_ids"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            assert a.num_supervised_global == b.num_supervised_global


def test_seeking_far_in_packed_rows_reads_one_step_only(
    any_dataset: InstructionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = packing_of(any_dataset)
    reads: list[int] = []
    original = InstructionDataset.sample

    def counted(self: InstructionDataset, index: int) -> tuple[list[int], list[int]]:
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(InstructionDataset, "sample", counted)
    (step,) = steps(any_dataset, 1, start=10**9, packing=packing)
    assert len(reads) == len(rows_of(step))


def test_a_sample_cut_at_max_length_fills_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"instruction": "q", "output": "a" * count} for count in (100, 3, 2)]  # 122, 25 and 24 tokens
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cut = load_instructions([DataSource(str(tmp_path / "a.jsonl"))], "data.train", tiny_tokenizer(tmp_path), 50)
    assert cut.num_tokens.tolist() == [50, 25, 24]
    packing = pack_sets(cut.num_tokens, cut.mixture, 50, 0)
    assert sorted(sorted(packing.row(i).tolist()) for i in range(len(packing))) == [[0], [1, 2]]
    (step,) = steps(cut, 1, batch_size=2, micro=2, packing=packing)
    assert sorted(rows_of(step).values()) == sorted(cut.sample(i) for i in range(3))


def test_share_of_padding_by_hand() -> None:
    """4 rows in micro-batches of 2: sorted, 8 + 6 and 3 + 1 tokens cost 8 + 8 and 3 + 3, whatever their order."""
    assert padding_share(np.array([3, 8, 1, 6]), Mixture([4]), 0, 4, 2) == pytest.approx(1 - 18 / 22)
    assert padding_share(np.array([3, 8, 1, 6]), Mixture([4]), 0, 4, 1) == 0


def test_share_of_padding_is_that_of_the_batches(any_dataset: InstructionDataset) -> None:
    packing = packing_of(any_dataset)
    for rows, mixture, plan in (
        (any_dataset.num_tokens, any_dataset.mixture, None),
        (packing.sums(any_dataset.num_tokens), packing.mixture, packing),
    ):
        num_steps = -(-mixture.num_places // 8)
        masks = [batch.attention_mask for step in steps(any_dataset, num_steps, packing=plan) for batch in step]
        real, all_ = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        assert padding_share(rows, mixture, 3, 8, 2) == pytest.approx(1 - real / all_)
