"""Experts that start from the gradient, under ZeRO: the numbers of one device, drawn once in a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config import LossesConfig, Recipe
from tests.conftest import PoolFactory, release
from tests.engine_ranks import (
    Job,
    assert_bf16_goes_on_to_the_last_bit,
    assert_parity,
    build_engine,
    numbers_of,
    put_together,
    start_batches_of,
    train_on_rank,
)
from tests.expert_parallel import partitioned
from tests.plain_training import SGD, Training, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 5
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# With these seeds no token comes near the border between two experts.
METHODS: dict[str, dict[str, Any]] = {
    "joint": {"adapter": {}, "optim": SGD, "seed": 5},
    "per_expert": {"adapter": {"init_spread": "per_expert"}, "optim": SGD | {"max_grad_norm": 0.7}, "seed": 100},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Training]]:
    """By spread, a recipe, and what plain torch makes of it from the whole gradient."""
    base, found = make_base(tmp_path_factory.mktemp("base")), {}
    for name, method in METHODS.items():
        adapter = {"init": "gradient", "num_experts": 4, "top_k": 2, "lora_modules": ["o_proj"], **method["adapter"]}
        recipe = make_recipe(base, max_steps=WHOLE, **method | {"adapter": adapter})
        found[name] = recipe, train_plainly(recipe)
    return found


def test_the_references_learn_and_are_not_moved_by_rounding(references: dict[str, tuple[Recipe, Training]]) -> None:
    """What the comparisons below rest on."""
    for _, expected in references.values():
        assert expected.smallest_gap > 1e-3
        assert expected.final_loss < 0.95 * expected.losses[0]


@pytest.mark.parametrize(
    ("spread", "world_size", "ep_size", "settings"),
    [
        pytest.param("joint", 1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0-alone"),
        pytest.param("joint", 2, 1, {"zero": {"stage": 0}, "partitioned": False, "start_passes": 3}, id="stage-0"),
        pytest.param(
            "joint",
            2,
            1,
            {"zero": {"stage": 1}, "partitioned": False, "accumulation": 2, "start_passes": 3},
            id="stage-1",
        ),
        pytest.param("per_expert", 2, 1, {"zero": {"stage": 2}, "accumulation": 3, "start_passes": 2}, id="stage-2"),
        pytest.param("joint", 2, 1, {"accumulation": 2, "start_passes": 1, "fillers": True}, id="stage-3"),
        pytest.param("per_expert", 3, 1, {"partitioned": False}, id="three-ranks"),
        pytest.param("joint", 4, 1, {"zero": {"stage": 2}, "partitioned": False}, id="four-ranks", marks=release),
        pytest.param(
            *("joint", 2, 1, {"zero": {"stage3_param_persistence_threshold": 100_000}}),
            id="small-parameters-kept-whole",
        ),
        pytest.param(
            *("joint", 2, 1, {"zero": OFFLOADED, "start_passes": 3}),
            id="offloaded",
        ),
        pytest.param("joint", 2, 2, {"accumulation": 2}, id="ep-size-2-joint"),
        pytest.param("per_expert", 2, 2, {"partitioned": False}, id="ep-size-2-per-expert"),
        pytest.param("joint", 4, 2, {}, id="ep-size-2-of-four-ranks", marks=release),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory,
    references: dict[str, tuple[Recipe, Training]],
    spread: str,
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = references[spread]
    shares = worker_pool(world_size).run(train_on_rank, Job(partitioned(recipe, ep_size), **settings))
    assert_parity(shares, expected, 1e-5)


def start_on_rank(job: Job, spoil: bool = False) -> tuple[dict[str, Any], list[int], Any, str]:
    """What the start puts in place, how many numbers its all-reduces carry, what it reports, and what it refuses."""
    from dsmoelora.errors import UserError
    from dsmoelora.parallel import comm, gradient_start

    engine, sizes = build_engine(job), []
    summed = comm.sum_over_ranks

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return summed(tensor)

    def overflow(_: Any, __: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: grad * torch.inf)

    if spoil and comm.rank() == comm.world_size() - 1:
        engine.model.get_submodule("model.layers.0.mlp").register_forward_hook(overflow)
    before = numbers_of(engine)
    with mock.patch.object(gradient_start.comm, "sum_over_ranks", counted):
        try:
            report, said = engine.draw_start(start_batches_of(job)), ""
        except UserError as error:
            return {}, sizes, None, str(error)
    after = numbers_of(engine)
    assert engine.step == engine.optimizer.num_steps == 0
    _check_changes(before, after)
    return after, sizes, report, said


def _check_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Moments are at 0, routers as they were, `b` is 0, and was not."""
    for kind, tensors in after.items():
        for name, held in tensors.items():
            for (*_, old), (*_, new) in zip(before[kind][name], held, strict=True):
                if kind != "value":
                    assert not new.any()
                elif ".router." in name:
                    assert torch.equal(old, new)
                elif name.endswith(".b"):
                    assert old.any() and not new.any()


def whole_start(worker_pool: PoolFactory, world_size: int, job: Job) -> tuple[dict[str, torch.Tensor], list[Any]]:
    shares = worker_pool(world_size).run(start_on_rank, job)
    experts = job.recipe.adapter.num_experts
    sizes = {"q_proj": (34, 32), "v_proj": (34, 16), "down_proj": (50, 34), "o_proj": (32, 34)}
    shapes = {}
    for name in {name for share in shares for name in share[0]["value"]}:
        layer, part, factor = name.split(".")[-3:]
        num_rows = sizes[layer]["ab".index(factor)] if part == "experts" else sizes[layer][0]
        own = 1 if layer == "o_proj" else experts
        shapes[name] = torch.Size((own, num_rows, 3) if part == "experts" else (own, num_rows))
    return put_together([share[0] for share in shares], "value", shapes), shares


def test_the_start_is_one_all_reduce_and_touches_nothing_else(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]]
) -> None:
    recipe, _ = references["joint"]
    _, shares = whole_start(worker_pool, 2, Job(recipe))
    for _, sizes, report, _ in shares:
        assert sizes == [3 * (4 * (34 + 34 + 50) + 32)], "every a, once"
        assert (report.num_directions, report.num_drawn) == (3 * (4 * 3 + 1), 0)


def weights_and_masters(jobs: list[Job]) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Of each job, what this rank's masters hold after the start, and on rank 0 what the model computes with."""
    from dsmoelora.parallel.adapter_tensors import tensors_on_rank_0

    found = []
    for job in jobs:
        engine = build_engine(job)
        engine.draw_start(start_batches_of(job))
        found.append((numbers_of(engine), tensors_on_rank_0(engine.model, engine.placement)))
    return found


def test_in_bf16_the_model_follows_masters_in_fp32(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]]
) -> None:
    """At every stage that partitions: directions are orthogonal in the masters, and rounded in the model."""
    recipe, _ = references["joint"]
    recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    stages: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3} | OFFLOADED]
    jobs = [Job(recipe, zero=zero, partitioned=zero["stage"] == 3, accumulation=2, start_passes=3) for zero in stages]
    shares = worker_pool(2).run(weights_and_masters, jobs)
    for ranks in zip(*shares, strict=True):
        weights = ranks[0][1]
        shapes = {name: weight.shape for name, weight in weights.items()}
        masters = put_together([numbers for numbers, _ in ranks], "value", shapes)
        for name, weight in weights.items():
            assert torch.equal(weight, masters[name].to(torch.bfloat16)), name
            if name.endswith("experts.a"):
                joined_DF = masters[name].permute(1, 0, 2).flatten(1)
                gram_FF = joined_DF.T @ joined_DF
                torch.testing.assert_close(gram_FF, torch.eye(len(gram_FF)) / 3, rtol=0, atol=0.1)
                assert (gram_FF.diagonal() > 0.2).all()


def test_losses_of_routers_and_outputs_are_not_in_the_start(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]]
) -> None:
    """Nor does it matter where dropout is made, and that layers are computed twice."""
    recipe, _ = references["joint"]
    recipe = replace(recipe, adapter=replace(recipe.adapter, lora_dropout=0.2))
    expected, _ = whole_start(worker_pool, 1, Job(recipe))
    losses = LossesConfig(balance=0.1, z=0.1, contrastive=0.1, contrastive_coactive=0.1)
    recipe = replace(recipe, losses=losses, train=replace(recipe.train, activation_checkpointing=True))
    found, _ = whole_start(worker_pool, 2, Job(recipe, accumulation=2))
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_gradient_that_is_not_finite_on_one_rank_is_everybodys_error(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]]
) -> None:
    recipe, _ = references["joint"]
    for stage in (0, 2, 3):
        job = Job(recipe, zero={"stage": stage}, partitioned=stage == 3)
        for *_, report, said in worker_pool(2).run(start_on_rank, job, True):
            assert report is None and "adapter.init = gradient, is not finite" in said


def test_a_run_goes_on_to_the_last_bit_without_another_start(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]], tmp_path: Path
) -> None:
    assert_bf16_goes_on_to_the_last_bit(worker_pool, references["joint"][0], tmp_path)


def test_a_checkpoint_of_two_ranks_goes_on_elsewhere(
    worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]], tmp_path: Path
) -> None:
    recipe, expected = references["joint"]
    worker_pool(2).run(train_on_rank, Job(partitioned(recipe, 2), last_step=HALF, save_to=tmp_path))
    job = Job(recipe, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}", zero={"stage": 0}, partitioned=False)
    for share in worker_pool(1).run(train_on_rank, job):
        torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=1e-5, atol=0)


def start_after_overflows(job: Job) -> tuple[float, int]:
    """In fp16, with a first loss scale that is too large: the scale after the start, and directions that are drawn."""
    from dsmoelora.parallel import loss_scale

    engine = build_engine(job)
    first = loss_scale.of(engine._deepspeed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._deepspeed.optimizer.loss_scaler, "cur_scale", 2.0**40)
        patch.setattr(engine._deepspeed.optimizer.loss_scaler, "cur_hysteresis", 1)
        report = engine.draw_start(start_batches_of(job))
        return loss_scale.of(engine._deepspeed) / first, report.num_drawn


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="the accelerator has no fp16")
def test_fp16_looks_for_a_loss_scale(worker_pool: PoolFactory, references: dict[str, tuple[Recipe, Training]]) -> None:
    recipe, _ = references["joint"]
    recipe = replace(
        recipe, model=replace(recipe.model, dtype="fp16"), train=replace(recipe.train, max_skipped_steps=40)
    )
    for scale, num_drawn in worker_pool(2).run(start_after_overflows, Job(recipe)):
        assert scale < 2.0**24 and num_drawn < 39
