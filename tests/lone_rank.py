"""One rank of many: the real engine on torch's fake process group, in which every other rank says what this one says.

    python -m tests.lone_rank W rank stage ep_size folder

Prints what the rank holds, the collectives of a step, and seconds until the engine was there and had taken four steps,
as JSON. Rank 0 alone reads weights, so those of another rank are all zero.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any
from unittest import mock

from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, ParallelConfig, Recipe, TrainConfig

ZERO: dict[str, Any] = {
    "reduce_bucket_size": 10_000,
    "stage3_param_persistence_threshold": 4_096,  # norms, routers, and most of the experts' factors
    "stage3_prefetch_bucket_size": 10_000,
    "stage3_max_reuse_distance": 0,
}


def recipe_of(base: str, world_size: int, ep_size: int) -> Recipe:
    """Of which no border of up to 1,024 ranks cuts a row: then all ranks have the same to say of cut rows."""
    return Recipe(
        model=ModelConfig(path=base, dtype="fp32"),
        adapter=AdapterConfig(num_experts=4 * ep_size, r=4, top_k=2, target_modules="all-linear"),
        optim=OptimConfig(preconditioner="tangent"),
        data=DataConfig(max_length=16),
        train=TrainConfig(micro_batch_size=2, batch_size=2 * world_size),
        parallel=ParallelConfig(ep_size=ep_size, exchange="gather" if ep_size > 1 else "auto"),
    )


def hold_zeros() -> None:
    """Have memory that nobody has written to be zero, also inside `zero.Init`: garbage need not be finite."""
    import torch
    from deepspeed.runtime.zero import partition_parameters

    empty = torch.empty

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).zero_()

    torch.empty = partition_parameters._orig_torch_empty = zeros  # type: ignore[assignment]


def held_by(engine: Any) -> list[list[Any]]:
    """Name, first and last element (as of all experts) of each segment of the rank's shards, and where it lies."""
    shards = engine.optimizer.shards
    return [[k, one.of.name, one.start, one.stop] for k, shard in enumerate(shards) for one in shard.segments]


def main() -> None:
    """Take four steps, and print what the last of them sent."""
    world_size, rank, stage, ep_size = map(int, sys.argv[1:5])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    import torch
    from deepspeed.runtime.zero import utils as zero_utils
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dsmoelora.parallel import comm
    from tests.traffic_of_rank import train_and_record

    def meet(*_: Any) -> None:
        torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    with mock.patch.object(comm, "meet", meet):
        comm.init("gloo")
    if rank:
        hold_zeros()
        # DeepSpeed compares lists with those of rank 0, which says nothing here
        zero_utils.assert_ints_same_as_other_ranks = zero_utils.assert_lst_len_same_as_other_ranks = lambda own: None
        zero_utils.get_lst_from_rank0 = lambda own: own
    start, held = time.perf_counter(), []
    recipe = recipe_of(sys.argv[5], world_size, ep_size)
    found = train_and_record(recipe, {"stage": stage, **ZERO}, lambda engine: held.append(held_by(engine)))
    rows = [(*key, messages, found.num_bytes[key]) for key, messages in found.messages.items()]
    print("\n" + json.dumps({"seconds": time.perf_counter() - start, "rows": rows, "held": held[0]}))


if __name__ == "__main__":
    main()
