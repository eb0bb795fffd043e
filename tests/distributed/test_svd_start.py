"""Experts that start from singular vectors, under ZeRO: the numbers of one device, and a start that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.adapters.folder_files import START_FILE
from dsmoelora.config import Recipe
from tests.conftest import PoolFactory, release
from tests.engine_ranks import (
    Job,
    Share,
    assert_bf16_goes_on_to_the_last_bit,
    assert_parity,
    batches_of,
    build_engine,
    train_on_rank,
)
from tests.expert_parallel import partitioned
from tests.plain_training import SGD, Training, global_batch, make_base, make_recipe, train_plainly

HALF, WHOLE = 2, 5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Training]:
    """A recipe, and what plain torch makes of it; no token comes near the border between two experts."""
    adapter = {"init": "svd", "num_experts": 4, "top_k": 2}
    recipe = make_recipe(
        make_base(tmp_path_factory.mktemp("base")), adapter=adapter, optim=SGD, max_steps=WHOLE, seed=50
    )
    return recipe, train_plainly(recipe)


def test_the_reference_learns_and_is_not_moved_by_rounding(reference: tuple[Recipe, Training]) -> None:
    """What the comparisons below rest on."""
    _, expected = reference
    assert expected.smallest_gap > 1e-4
    assert expected.final_loss < 0.95 * expected.losses[0]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "settings"),
    [
        pytest.param(1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0"),
        pytest.param(2, 1, {"zero": {"stage": 1}, "partitioned": False}, id="stage-1", marks=release),
        pytest.param(2, 1, {"zero": {"stage": 2}}, id="stage-2"),
        pytest.param(2, 1, {"accumulation": 2}, id="stage-3"),
        pytest.param(2, 1, {"partitioned": False}, id="stage-3-not-partitioned", marks=release),
        pytest.param(
            2,
            1,
            {"zero": {"stage3_param_persistence_threshold": 100_000}},
            id="small-parameters-kept-whole",
            marks=release,
        ),
        pytest.param(
            2, 1, {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}, id="offloaded"
        ),
        pytest.param(2, 2, {}, id="ep-size-2"),
        pytest.param(2, 2, {"partitioned": False, "accumulation": 2}, id="ep-size-2-not-partitioned"),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory,
    reference: tuple[Recipe, Training],
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    recipe, expected = reference
    shares = worker_pool(world_size).run(train_on_rank, Job(partitioned(recipe, ep_size), **settings))
    assert_parity(shares, expected, 1e-5)


def decompositions(job: Job, broken_on: int | None) -> tuple[int, str]:
    """How many this rank makes as it builds an engine, and what is wrong if one fails on some rank."""
    from dsmoelora.errors import UserError
    from dsmoelora.parallel import comm

    svd, count = torch.linalg.svd, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if comm.rank() == broken_on:
            raise torch.linalg.LinAlgError("no convergence")
        return svd(*args, **options)

    with mock.patch.object(torch.linalg, "svd", counted):
        try:
            build_engine(job)
        except UserError as error:
            return count, str(error)
    return count, ""


def test_layers_are_dealt_out_to_the_ranks(worker_pool: PoolFactory, reference: tuple[Recipe, Training]) -> None:
    """q, v and down_proj on two ranks; and a decomposition that fails on one rank is everybody's error."""
    recipe, _ = reference
    assert worker_pool(2).run(decompositions, Job(recipe), None) == [(2, ""), (1, "")]
    for count, said in worker_pool(2).run(decompositions, Job(recipe), 1):
        assert count == 1 and "has no singular value decomposition: no convergence" in said


@pytest.fixture(scope="module")
def saved(
    worker_pool: PoolFactory, reference: tuple[Recipe, Training], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Share]]:
    """A checkpoint of two ranks in the middle of the run, and the run without a break."""
    recipe, _ = reference
    root = tmp_path_factory.mktemp("run")
    worker_pool(2).run(train_on_rank, Job(recipe, last_step=HALF, save_to=root))
    return root / f"checkpoint-{HALF}", worker_pool(2).run(train_on_rank, Job(recipe))


@contextmanager
def other_signs() -> Iterator[None]:
    """Decompose as another machine might: every singular vector the other way round."""
    svd = torch.linalg.svd

    def flipped(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, singular, v = svd(*args, **options)
        return -u, singular, -v

    with mock.patch.object(torch.linalg, "svd", flipped):
        yield


def go_on_elsewhere(job: Job, adapter: Path) -> tuple[Share, Tensor]:
    with other_signs():
        engine = build_engine(job)
        assert job.load_from is not None
        engine.load(job.load_from)
    results = [engine.train_step(batches_of(job, step)) for step in range(HALF, WHOLE)]
    engine.save_adapter(adapter)
    final_loss = engine.evaluate(batches_of(job, 0))
    engine.model.eval()
    with torch.no_grad():
        logits = engine.model(global_batch(0)[0]).logits
    share = Share([r.loss for r in results], [], [], final_loss, engine.optimizer.num_steps, {})
    return share, logits


@pytest.mark.parametrize(
    ("world_size", "ep_size", "settings"),
    [
        pytest.param(1, 1, {"zero": {"stage": 0}, "partitioned": False}, id="stage-0-alone"),
        pytest.param(2, 1, {}, id="stage-3"),
        pytest.param(2, 2, {"zero": {"offload_param": {"device": "cpu"}}}, id="ep-size-2-offloaded"),
        pytest.param(2, 1, {"zero": {"stage": 2}, "partitioned": False}, id="stage-2", marks=release),
    ],
)
def test_a_run_goes_on_from_the_start_that_the_checkpoint_holds(
    worker_pool: PoolFactory,
    reference: tuple[Recipe, Training],
    saved: tuple[Path, list[Share]],
    tmp_path: Path,
    world_size: int,
    ep_size: int,
    settings: dict[str, Any],
) -> None:
    """Also where a decomposition would give other vectors; and the adapter is right on an untouched base."""
    (recipe, _), (checkpoint, uninterrupted) = reference, saved
    job = Job(partitioned(recipe, ep_size), load_from=checkpoint, **settings)
    shares = worker_pool(world_size).run(go_on_elsewhere, job, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    with torch.no_grad():
        of_base = base(global_batch(0)[0]).logits
        loaded = load_adapter(base, tmp_path / "adapter")(global_batch(0)[0]).logits
    assert (loaded - of_base).norm() > 0.05 * of_base.norm()
    for share, logits in shares:
        torch.testing.assert_close(share.losses, uninterrupted[0].losses[HALF:], rtol=1e-5, atol=0)
        torch.testing.assert_close(share.final_loss, uninterrupted[0].final_loss, rtol=1e-5, atol=0)
        assert (logits - loaded).norm() <= 1e-5 * loaded.norm()
    start = load_file(tmp_path / "adapter" / START_FILE)
    assert {name: value.shape[0] for name, value in start.items()} == dict.fromkeys(start, 4) and len(start) == 6


def test_the_same_ranks_go_on_to_the_last_bit(
    worker_pool: PoolFactory, reference: tuple[Recipe, Training], tmp_path: Path
) -> None:
    assert_bf16_goes_on_to_the_last_bit(worker_pool, reference[0], tmp_path)


def gathered_at_most(job: Job) -> tuple[float, list[int], list[str]]:
    """A loss with even gates, how many base weights were whole beside each that was opened, and errors."""
    from dsmoelora.errors import UserError
    from dsmoelora.parallel import start_shards, zero

    more = []
    open_weights = start_shards._open_weights

    @contextmanager
    def watched(weights: list[Any]) -> Iterator[None]:
        with open_weights(weights):
            whole = [one for one in known if zero.is_partitioned(one) and one.numel() == zero.full_numel(one)]
            more.append(len(whole) - len(weights))
            yield

    known: list[Any] = []
    begin = start_shards.start_experts

    def starting(model: Any, *args: Any) -> float:
        known.extend(model.parameters())
        return begin(model, *args)

    with mock.patch.multiple(start_shards, _open_weights=watched, start_experts=starting):
        engine = build_engine(job)
    losses = [engine.evaluate(batches_of(job, 0), routed=False), engine.evaluate(batches_of(job, 0))]
    try:
        engine.load(Path("checkpoint-1"))
        said = ["nothing"]
    except UserError as error:
        said = [str(error)]
    assert len(more) == 2 * 3, "each of three layers is opened to be decomposed and to be shifted"
    return losses[0], more, said


def test_one_whole_weight_at_a_time_and_uniform_gates_give_back_the_base(
    worker_pool: PoolFactory, reference: tuple[Recipe, Training]
) -> None:
    recipe, _ = reference
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    ids_BS, mask_BS, labels_BS = global_batch(0)
    with torch.no_grad():
        log_probs = base(ids_BS, attention_mask=mask_BS).logits[:, :-1].log_softmax(-1)
    targets_BS = labels_BS[:, 1:]
    chosen_BS = log_probs.gather(-1, targets_BS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -chosen_BS[targets_BS != -100].mean().item()
    for loss, more, said in worker_pool(2).run(gathered_at_most, Job(partitioned(recipe, 2))):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert not any(more)
        assert "checkpoint-1 cannot be loaded" in said[0] and "resumes=True" in said[0]
