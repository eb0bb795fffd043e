"""Checkpoints between real processes: other numbers of ranks, and errors that hit one rank alone."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.checkpoint import folders, rank_file
from dsmoelora.checkpoint.training_state import (
    checkpoint_bytes,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from dsmoelora.errors import UserError
from dsmoelora.parallel import comm
from tests.conftest import PoolFactory
from tests.shardings import (
    Segments,
    blank_shards,
    one_buffer,
    over_experts,
    per_parameter,
    random_numbers,
    shards_of,
    some_parameters,
)

NAMES = ["value", "exp_avg", "exp_avg_sq"]
PARAMETERS = some_parameters(random.Random(1), num_experts=4)
NUMBERS = random_numbers(PARAMETERS, NAMES, seed=1)
STATE = {"position": 12345, "lr": 0.1 + 0.2}


def layout_of(kind: str, world_size: int) -> list[Segments]:
    if kind == "over_experts":
        return over_experts(PARAMETERS, world_size, ep_size=2)
    return {"per_parameter": per_parameter, "one_buffer": one_buffer}[kind](PARAMETERS, world_size)


def save_as(kind: str, root: Path, step: int) -> str:
    shards = shards_of(layout_of(kind, comm.world_size())[comm.rank()], NUMBERS, padding=float("nan"))
    return str(save_checkpoint(root, step, shards, STATE, keep=2))


def load_as(kind: str, root: Path) -> bool:
    """Whether the newest checkpoint gives this rank the numbers that it should hold, to the last bit."""
    segments = layout_of(kind, comm.world_size())[comm.rank()]
    shards, expected = blank_shards(segments, NAMES, -7.0), shards_of(segments, NUMBERS, padding=-7.0)
    folder = newest_whole_checkpoint(root)
    assert folder is not None
    assert load_checkpoint(folder, shards) == STATE
    return all(
        torch.equal(tensor.view(torch.int32), wanted.tensors[name].view(torch.int32))
        for shard, wanted in zip(shards, expected, strict=True)
        for name, tensor in shard.tensors.items()
    )


def bytes_as(kind: str) -> int:
    return checkpoint_bytes(blank_shards(layout_of(kind, comm.world_size())[comm.rank()], NAMES, 0.0))


def error_of(fn: Any, *args: Any) -> tuple[str, str]:
    try:
        fn(*args)
    except (UserError, OSError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def save_with_a_disk_full_for(failing_rank: int, root: Path, step: int) -> tuple[str, str]:
    """Save while the given rank's file does not reach the disk."""

    def fail(file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if comm.rank() == failing_rank:
            patch.setattr(rank_file, "flush_to_disk", fail)
        return error_of(save_as, "per_parameter", root, step)


def load_what_one_rank_cannot_hold(root: Path, short_rank: int) -> tuple[str, str]:
    shards = blank_shards(layout_of("per_parameter", comm.world_size())[comm.rank()], NAMES, 0.0)
    if comm.rank() == short_rank:
        shards[0].tensors["exp_avg"] = torch.zeros(0)
    return error_of(load_checkpoint, root / "checkpoint-1", shards)


def newest_here(root: Path) -> str:
    return str(newest_whole_checkpoint(root))


def newest_on_a_disk_that_fails_for(failing_rank: int, root: Path) -> tuple[str, str]:
    def fail(_: Path) -> list[Path]:
        raise OSError("Stale file handle")

    with pytest.MonkeyPatch.context() as patch:
        if comm.rank() == failing_rank:
            patch.setattr(folders, "candidates", fail)
        return error_of(newest_whole_checkpoint, root)


def test_four_ranks_save_two_ranks_load_and_save_one_rank_loads(worker_pool: PoolFactory, tmp_path: Path) -> None:
    assert worker_pool(4).run(save_as, "over_experts", tmp_path, 1) == [str(tmp_path / "checkpoint-1")] * 4
    assert worker_pool(4).run(load_as, "per_parameter", tmp_path) == [True] * 4
    assert worker_pool(2).run(load_as, "over_experts", tmp_path) == [True] * 2
    worker_pool(2).run(save_as, "one_buffer", tmp_path, 2)
    assert load_as("per_parameter", tmp_path)
    save_as("per_parameter", tmp_path, 3)
    assert worker_pool(4).run(load_as, "one_buffer", tmp_path) == [True] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_size_is_the_same_for_every_number_of_ranks(worker_pool: PoolFactory) -> None:
    expected = sum(torch.Size(each.shape).numel() for each in PARAMETERS) * len(NAMES) * 4
    assert worker_pool(4).run(bytes_as, "over_experts") == [expected] * 4
    assert bytes_as("one_buffer") == expected


@pytest.mark.parametrize("failing_rank", [0, 3])
def test_full_disk_on_one_rank_reaches_all(worker_pool: PoolFactory, tmp_path: Path, failing_rank: int) -> None:
    worker_pool(4).run(save_as, "per_parameter", tmp_path, 1)
    outcomes = worker_pool(4).run(save_with_a_disk_full_for, failing_rank, tmp_path, 2, timeout_s=30)
    for rank, (kind, message) in enumerate(outcomes):
        assert kind == ("CheckpointError" if rank == failing_rank else "UserError")
        assert "No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert worker_pool(4).run(load_as, "per_parameter", tmp_path) == [True] * 4


def test_a_folder_that_rank_0_cannot_list_reaches_all(worker_pool: PoolFactory, tmp_path: Path) -> None:
    kinds = [kind for kind, _ in worker_pool(2).run(newest_on_a_disk_that_fails_for, 0, tmp_path, timeout_s=30)]
    assert kinds == ["OSError", "UserError"]
    assert [kind for kind, _ in worker_pool(2).run(newest_on_a_disk_that_fails_for, 1, tmp_path)] == ["none"] * 2


def test_shard_that_does_not_fit_on_one_rank_reaches_all(worker_pool: PoolFactory, tmp_path: Path) -> None:
    worker_pool(4).run(save_as, "per_parameter", tmp_path, 1)
    outcomes = worker_pool(4).run(load_what_one_rank_cannot_hold, tmp_path, 2, timeout_s=30)
    assert [kind for kind, _ in outcomes] == ["UserError", "UserError", "CheckpointError", "UserError"]
    assert all("`exp_avg` of parameter" in message for _, message in outcomes)


def test_damage_that_one_rank_finds_is_agreed_on_by_all(worker_pool: PoolFactory, tmp_path: Path) -> None:
    for step in (1, 2):
        worker_pool(4).run(save_as, "per_parameter", tmp_path, step)
    path = tmp_path / "checkpoint-2" / "rank-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert worker_pool(4).run(newest_here, tmp_path) == [str(tmp_path / "checkpoint-1")] * 4
    assert worker_pool(2).run(newest_here, tmp_path) == [str(tmp_path / "checkpoint-1")] * 2
    outcomes = worker_pool(4).run(error_of, load_checkpoint, tmp_path / "checkpoint-2", [], timeout_s=30)
    assert {kind for kind, _ in outcomes} == {"CheckpointError"}
    assert len({message for _, message in outcomes}) == 1
    assert "rank-00003.safetensors does not match its checksum" in outcomes[0][1]
