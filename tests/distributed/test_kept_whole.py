"""Adapters that stay whole on every rank are not gathered layer by layer; what is optimised stays cut into pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from tests.conftest import PoolFactory
from tests.engine_ranks import Job, batches_of, build_engine
from tests.plain_training import ADAMW, make_base, make_recipe
from tests.traffic_of_rank import recorded_step

# as in a model that is too large for its weights to stay from one pass to the next
LARGE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
THRESHOLD = "stage3_param_persistence_threshold"


def numbers_gathered(job: Job) -> tuple[int, int, float]:
    """Gathers of a step with its numbers, after a first one, and the share of the masters that lies on this rank."""
    engine = build_engine(job)
    engine.train_step(batches_of(job, 0))
    sizes: list[int] = []
    backend = deepspeed.comm.comm.cdb  # which all of DeepSpeed's gathers come to
    gather = backend.all_gather_into_tensor

    def counted(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output_tensor.numel())
        return gather(output_tensor, *args, **kwargs)

    with mock.patch.object(backend, "all_gather_into_tensor", counted):
        engine.train_step(batches_of(job, 1))
    held = sum(shard.tensor.numel() for shard in engine.optimizer.shards)
    return len(sizes), sum(sizes), held / engine.num_trainable


def test_adapters_above_deepspeeds_threshold_are_gathered_once_a_step(worker_pool: PoolFactory, tmp_path: Path) -> None:
    """Factors of 20,400 numbers and more on a base whose matrices have more; DeepSpeed's threshold is made smaller.

    Four micro-batches, and so each factor was gathered in eight passes.
    """
    base = make_base(tmp_path, hidden_size=170, intermediate_size=340)
    adapter = {"r": 3, "num_experts": 20, "top_k": 2, "target_modules": ["down_proj"]}
    recipe = make_recipe(base, adapter=adapter, optim={"lr": 1e-3})
    found = {}
    for name, threshold in (("cut", 1000), ("kept", 20_400)):
        ranks = worker_pool(2).run(numbers_gathered, Job(recipe, accumulation=4, zero=LARGE | {THRESHOLD: threshold}))
        found[name] = ranks[0]
        assert all(share == pytest.approx(0.5, rel=0.01) for _, _, share in ranks), "masters stay in pieces"
    trained = 20 * 3 * (340 + 170)
    assert found["cut"][1] - found["kept"][1] >= 6 * trained
    assert found["kept"][0] < found["cut"][0]


ALL = {THRESHOLD: 10**9}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def not_as_its_pieces(engine: Any) -> list[str]:
    """Parameters that are not whole on this rank, or not what the ranks hold of them in pieces."""
    found = []
    for name, parameter in engine.model.named_parameters():
        group = parameter.ds_process_group
        pieces: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(pieces, parameter.ds_tensor, group=group)
        of_pieces = torch.cat(pieces)[: parameter.ds_numel]
        if parameter.shape != parameter.ds_shape or not torch.equal(parameter.detach().flatten(), of_pieces):
            found.append(name)
    return found


def step_with_all_whole(job: Job, folder: Path) -> tuple[dict[str, list[str]], list[int], dict[str, int]]:
    """What is wrong at each moment; gathers of each process group after a step's passes; numbers of each parameter."""
    engine = build_engine(job)
    numel = {name: parameter.ds_numel for name, parameter in engine.model.named_parameters()}
    for number in range(2):  # in which ZeRO-3 learns the order of the modules, and lets go of what is to stay, too
        engine.train_step(batches_of(job, number))
    wrong = {"first": not_as_its_pieces(engine)}
    sent = recorded_step(engine, batches_of(job, 2)).messages
    wrong["third step"] = not_as_its_pieces(engine)
    engine.save(folder, {}, keep=1)
    engine.train_step(batches_of(job, 3))
    engine.load(folder / "checkpoint-3")
    engine.evaluate(batches_of(job, 0))
    wrong["loaded"] = not_as_its_pieces(engine)
    first = next(parameter for name, parameter in engine.model.named_parameters() if name.endswith("experts.b"))
    spoil = first.register_hook(lambda grad: grad * torch.nan)
    assert engine.train_step(batches_of(job, 3)).skipped
    spoil.remove()
    wrong["skipped"] = not_as_its_pieces(engine)
    return wrong, sorted(n for (phase, op, _), n in sent.items() if (phase, op) == ("step", "all_gather")), numel


@pytest.mark.parametrize(
    ("world_size", "ep_size", "dtype", "zero", "num_gathers"),
    [
        (1, 1, "fp32", ALL, []),
        (2, 1, "bf16", ALL, [1]),
        (4, 1, "fp32", ALL | OFFLOADED, [1]),
        (4, 2, "bf16", ALL, [1, 1]),  # all ranks share routers, two have the same experts
    ],
)
def test_what_stays_whole_comes_together_after_a_step(
    world_size: int,
    ep_size: int,
    dtype: Any,
    zero: dict[str, Any],
    num_gathers: list[int],
    worker_pool: PoolFactory,
    tmp_path: Path,
) -> None:
    """Sizes that no number of ranks divides. What is frozen stays, and is not sent at all."""
    base = make_base(tmp_path / "base")
    recipe = make_recipe(base, adapter={"num_experts": 4}, optim=ADAMW)
    recipe = replace(
        recipe, model=replace(recipe.model, dtype=dtype), parallel=replace(recipe.parallel, ep_size=ep_size)
    )
    for wrong, found, _ in worker_pool(world_size).run(step_with_all_whole, Job(recipe, zero=zero), tmp_path / "at"):
        assert not any(wrong.values()), wrong
        assert found == num_gathers


def test_no_more_comes_together_than_is_fetched_ahead(worker_pool: PoolFactory, tmp_path: Path) -> None:
    """Room for the largest factor alone, (5, 3, 50), or for several smaller ones behind each other in the model."""
    recipe = make_recipe(make_base(tmp_path / "base"), adapter={}, optim=ADAMW)
    job = Job(recipe, zero=ALL | {"stage3_prefetch_bucket_size": 750})
    ((wrong, found, numel), _) = worker_pool(2).run(step_with_all_whole, job, tmp_path / "at")
    assert not any(wrong.values()), wrong
    trained = [size for name, size in numel.items() if ".experts." in name or ".router." in name]
    gathers, free = 0, 0
    for size in trained:
        gathers, free = (gathers, free - size) if size <= free else (gathers + 1, 750 - size)
    assert found == [gathers] and 1 < gathers < len(trained)
