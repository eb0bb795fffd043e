"""The Riemannian preconditioner under ZeRO-2 and ZeRO-3: the numbers of one device, and one all-reduce a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory, release, thorough
from tests.counted_training import train_and_count
from tests.engine_ranks import (
    Job,
    Pieces,
    Share,
    assert_parity,
    batches_of,
    build_engine,
    numbers_of,
    put_together,
    train_on_rank,
)
from tests.plain_training import Training, make_base, make_recipe, preconditioned, train_plainly

COMMON = {"damping": 0.1, "damping_abs": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "scaled-clipped": {"name": "adamw", "lr": 3e-3, "lr_router": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "tangent": {"name": "adamw", "lr": 3e-3, "lr_router": 1e-3, "betas": (0.7, 0.8), "max_grad_norm": 0.0},
    "scaled": {"name": "sgd", "lr": 0.1, "lr_router": 0.1, "momentum": 0.9, "max_grad_norm": 0.0},
    "tangent-clipped": {
        "name": "sgd",
        "lr": 0.2,
        "lr_b_ratio": 2.0,
        "lr_router": None,
        "max_grad_norm": 0.5,
        "max_grad_norm_router": 0.02,
    },
}
# With these no token of a run comes within 1e-4 of the border between two experts, where rounding would choose.
SEEDS = {"scaled-clipped": 37, "tangent": 3, "scaled": 9, "tangent-clipped": 7}
NUM_EXPERTS, RANK = 5, 3


def weight_tolerance(method: str) -> float:
    """Adam turns rounding noise in tiny gradients into steps of the size of the learning rate."""
    return 1e-4 if METHODS[method]["name"] == "adamw" else 1e-5


@dataclass
class Reference:
    """What one device makes of a method, and the norm of the gradient that its base optimizer saw at each step."""

    recipe: Recipe
    training: Training
    norms: list[float]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


Plainly = Callable[..., Reference]


@pytest.fixture(scope="module")
def plainly(base: Path) -> Plainly:
    """`plainly(method)` is a method's recipe and what one device makes of it; few steps where that is enough."""
    trained: dict[tuple[str, int], Reference] = {}

    def get(method: str, max_steps: int = 20) -> Reference:
        if (method, max_steps) not in trained:
            optim = COMMON | METHODS[method] | {"preconditioner": method.partition("-")[0]}
            adapter = {"r": RANK, "num_experts": NUM_EXPERTS, "top_k": 2, "lora_dropout": 0.1}
            recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=max_steps, seed=SEEDS[method])
            norms: list[float] = []
            with preconditioned(recipe.optim, norms):
                trained[method, max_steps] = Reference(recipe, train_plainly(recipe), norms)
            assert trained[method, max_steps].training.smallest_gap > 1e-4
        return trained[method, max_steps]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_learns_and_what_is_switched_on_does_something(plainly: Plainly, method: str) -> None:
    """What the comparisons below rest on."""
    expected, norms = plainly(method).training, plainly(method).norms
    assert expected.final_loss < 0.95 * expected.losses[0]
    max_norm = METHODS[method]["max_grad_norm"]
    assert not max_norm or max(expected.grad_norms) > 1.2 * max_norm, "clipping must do something"
    assert max(norms) > 2 * min(max_norm or torch.inf, *expected.grad_norms), "and so must preconditioning"


def every_case() -> Iterator[tuple[int, int, int, str]]:
    """Stage, ranks, accumulation and method: all there are, clipped and not; rules and optimizers take turns."""
    for stage, world_size, accumulation in product((2, 3), (1, 2, 3, 4), (1, 4)):
        scaled = (stage + world_size + accumulation) % 2
        yield stage, world_size, accumulation, "scaled-clipped" if scaled else "tangent-clipped"
        yield stage, world_size, accumulation, "tangent" if scaled else "scaled"


# Of these, at each commit and for eight steps, eight in which every pair of settings occurs but ranks with method.
CORE = [
    (2, 1, 1, "tangent-clipped"),
    (2, 2, 1, "scaled-clipped"),
    (2, 3, 4, "tangent"),
    (2, 4, 4, "scaled"),
    (3, 1, 4, "tangent-clipped"),
    (3, 2, 4, "scaled-clipped"),
    (3, 3, 1, "tangent"),
    (3, 4, 1, "scaled"),
]


def test_every_pair_of_settings_occurs_at_each_commit() -> None:
    cases = list(every_case())
    assert set(CORE) <= set(cases)
    for one, other in combinations(range(4), 2):
        if (one, other) != (1, 3):
            assert {(case[one], case[other]) for case in CORE} == {(case[one], case[other]) for case in cases}


@pytest.mark.parametrize(
    ("stage", "world_size", "accumulation", "method", "max_steps"),
    [
        *((*case, 8) for case in CORE),
        (0, 3, 4, "scaled", 8),
        (0, 2, 1, "tangent-clipped", 8),
        (1, 2, 4, "scaled", 8),
        (1, 3, 1, "scaled-clipped", 8),
        *(thorough(*case, 20) for case in every_case()),
    ],
)
def test_stages_ranks_and_accumulation_change_nothing(
    worker_pool: PoolFactory,
    plainly: Plainly,
    stage: int,
    world_size: int,
    accumulation: int,
    method: str,
    max_steps: int,
) -> None:
    reference = plainly(method, max_steps)
    shares = worker_pool(world_size).run(train_on_rank, Job(reference.recipe, accumulation, zero={"stage": stage}))
    assert_parity(shares, reference.training, weight_tolerance(method))


ON_HOST = {"device": "cpu"}


@pytest.mark.parametrize(
    ("world_size", "accumulation", "method", "settings"),
    [
        pytest.param(3, 4, "tangent", {"zero": {"offload_optimizer": ON_HOST}}, id="optimizer-offloaded"),
        pytest.param(2, 1, "scaled", {"zero": {"stage": 2, "offload_optimizer": ON_HOST}}, id="stage-2-offloaded"),
        pytest.param(
            2, 4, "scaled", {"zero": {"stage": 1, "offload_optimizer": ON_HOST}}, id="stage-1-offloaded", marks=release
        ),
        pytest.param(
            *(2, 4, "scaled", {"zero": {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}}),
            id="all-offloaded",
            marks=release,
        ),
        pytest.param(3, 4, "tangent", {"zero": {"stage": 2, "round_robin_gradients": True}}, id="round-robin"),
        pytest.param(3, 1, "tangent-clipped", {"partitioned": False}, id="model-not-partitioned"),
        pytest.param(
            2, 4, "scaled-clipped", {"partitioned": False, "zero": {"stage": 2}}, id="stage-2-own-model", marks=release
        ),
    ],
)
def test_ways_of_zero_change_nothing(
    worker_pool: PoolFactory, plainly: Plainly, world_size: int, accumulation: int, method: str, settings: Any
) -> None:
    reference = plainly(method, max_steps=20 if method == "scaled" else 8)
    shares = worker_pool(world_size).run(train_on_rank, Job(reference.recipe, accumulation, **settings))
    assert_parity(shares, reference.training, weight_tolerance(method))


def in_bf16(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, dtype="bf16"))


@pytest.mark.parametrize(
    ("zero", "method"),
    [
        ({"stage": 3}, "scaled-clipped"),
        ({"stage": 2}, "tangent"),
        ({"stage": 1}, "scaled-clipped"),
        ({"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}, "scaled-clipped"),
        ({"stage": 1, "offload_optimizer": ON_HOST}, "tangent"),
    ],
)
def test_bf16_stays_within_two_percent_of_fp32(
    worker_pool: PoolFactory, plainly: Plainly, zero: dict[str, Any], method: str
) -> None:
    reference = plainly(method, max_steps=8)
    expected = [*reference.training.losses, reference.training.final_loss]
    for share in worker_pool(2).run(train_on_rank, Job(in_bf16(reference.recipe), 2, zero=zero)):
        torch.testing.assert_close([*share.losses, share.final_loss], expected, rtol=0.02, atol=0)


def num_cut_rows(training: Training, world_size: int) -> int:
    """Rows of factors inside of which ZeRO-3 begins a new piece, each counted once."""
    rows = set()
    for name, value in training.weights.items():
        if "experts" in name:
            piece = -(-value.numel() // world_size)
            rows |= {(name, start // RANK) for start in range(piece, value.numel(), piece) if start % RANK}
    return len(rows)


@pytest.mark.parametrize(
    ("stage", "world_size", "method"),
    [(3, 4, "tangent-clipped"), (3, 3, "scaled"), (2, 3, "tangent"), (3, 1, "scaled"), (2, 1, "tangent-clipped")],
)
def test_a_step_preconditions_once_with_one_all_reduce(
    worker_pool: PoolFactory, plainly: Plainly, stage: int, world_size: int, method: str
) -> None:
    """R x R matrices and cut rows are all that travels, once a step, however many micro-batches there are."""
    reference = plainly(method, max_steps=4)
    num_pairs = 3 * NUM_EXPERTS
    num_matrices = num_pairs * (3 if method.startswith("tangent") else 2)  # a^T a, b^T b, and a^T grad_a
    num_scalars = 1 if "max_grad_norm_router" in METHODS[method] else 0
    in_common = 4 * (num_matrices * RANK**2 + num_scalars)
    a_row = 4 * 2 * RANK  # of a factor and of its gradient
    job = Job(reference.recipe, accumulation=4, zero={"stage": stage})
    for counts in worker_pool(world_size).run(train_and_count, job):
        assert counts.num_applied == 4, "once a step, not once a micro-batch"
        assert len(counts.collectives) == 4
        assert counts.reads == []
        for found in counts.collectives:
            assert [each.name for each in found] == (["allreduce_.default"] if world_size > 1 else [])
            for each in found:
                if stage == 3:
                    assert each.num_bytes == in_common + a_row * num_cut_rows(reference.training, world_size)
                else:  # one piece a rank, so a row at most at each of their borders
                    assert in_common <= each.num_bytes <= in_common + a_row * (world_size - 1)
        for report, norm in zip(counts.reports, reference.norms, strict=True):
            assert report["preconditioned_norm"] == pytest.approx(norm, rel=1e-4)
            assert report["condition"] >= 1.0
            assert report["eigh_fallbacks"] == 0.0


@dataclass
class Mishap:
    """What a rank tells of three steps, the second with a gradient that is not finite on one rank."""

    skipped: list[bool]
    reports: list[dict[str, float]]
    counters: tuple[int, int, int]
    numbers: list[dict[str, Pieces]]  # before the first step and after each


def train_with_a_bad_gradient(job: Job, factor: float) -> Mishap:
    from dsmoelora.parallel import comm

    engine = build_engine(job)
    mishap = Mishap([], [], (0, 0, 0), [numbers_of(engine)])

    def spoil(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad and comm.rank() == 1 and engine.step == 1:
            output.register_hook(lambda grad: grad * factor)

    engine.model.get_submodule("model.layers.0.mlp").register_forward_hook(spoil)
    for step in range(3):
        result = engine.train_step(batches_of(job, step))
        mishap.skipped.append(result.skipped)
        mishap.reports.append(result.preconditioning)
        mishap.numbers.append(numbers_of(engine))
    mishap.counters = engine.step, engine.skipped_steps, engine.optimizer.num_steps
    return mishap


def differences(one: dict[str, Pieces], other: dict[str, Pieces]) -> dict[str, float]:
    """Largest difference of values and moments over all tensors."""
    return {
        kind: max(
            float((mine[2] - theirs[2]).abs().max())
            for name in one[kind]
            for mine, theirs in zip(one[kind][name], other[kind][name], strict=True)
        )
        for kind in one
    }


@pytest.mark.parametrize(
    ("stage", "dtype", "factor"),
    [
        (0, "fp32", torch.inf),
        (1, "bf16", torch.inf),
        (2, "fp32", torch.inf),
        (2, "bf16", torch.nan),
        (3, "fp32", torch.inf),
        (3, "bf16", torch.nan),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    worker_pool: PoolFactory, plainly: Plainly, stage: int, dtype: str, factor: float
) -> None:
    recipe = plainly("tangent", max_steps=4).recipe
    recipe = replace(recipe, optim=replace(recipe.optim, warmup_steps=0))
    recipe = in_bf16(recipe) if dtype == "bf16" else recipe
    mishaps = worker_pool(3).run(train_with_a_bad_gradient, Job(recipe, 2, zero={"stage": stage}), factor)
    for mishap in mishaps:
        assert mishap.skipped == [False, True, False]
        assert mishap.counters == (3, 1, 2), "steps, skipped steps, and steps of the optimizer"
        assert [bool(report) for report in mishap.reports] == [True, False, True]
        _, after_good, after_bad, after_next = mishap.numbers
        assert all(difference == 0 for difference in differences(after_good, after_bad).values())
        assert all(0 < difference < torch.inf for difference in differences(after_bad, after_next).values())
    # with b = 0 only b moves in the first step, and under stage 2 a rank may hold nothing of b
    moved = [differences(mishap.numbers[0], mishap.numbers[1]) for mishap in mishaps]
    assert all(max(one[kind] for one in moved) > 0 for kind in moved[0])


HALF, WHOLE = 3, 6


@pytest.mark.parametrize(("stage", "method"), [(3, "tangent"), (2, "scaled")])
def test_a_training_goes_on_with_its_moments(
    worker_pool: PoolFactory, plainly: Plainly, tmp_path: Path, stage: int, method: str
) -> None:
    """To the last bit on as many ranks, within rounding on others."""
    reference = plainly(method, max_steps=WHOLE)
    job = Job(reference.recipe, zero={"stage": stage})
    worker_pool(3).run(train_on_rank, replace(job, last_step=HALF, save_to=tmp_path))
    uninterrupted: list[Share] = worker_pool(3).run(train_on_rank, job)
    rest = replace(job, first_step=HALF, load_from=tmp_path / f"checkpoint-{HALF}")
    shapes = {name: value.shape for name, value in reference.training.weights.items()}
    for world_size in (3, 2):
        shares = worker_pool(world_size).run(train_on_rank, rest)
        tolerance = 0.0 if world_size == 3 else 1e-5
        for share in shares:
            expected = uninterrupted[0]
            torch.testing.assert_close(share.losses, expected.losses[HALF:], rtol=tolerance, atol=0)
            torch.testing.assert_close(share.final_loss, expected.final_loss, rtol=tolerance, atol=0)
        for kind in uninterrupted[0].numbers:
            whole, found = (put_together([s.numbers for s in each], kind, shapes) for each in (uninterrupted, shares))
            for name, value in whole.items():
                limit = (0.0 if world_size == 3 else weight_tolerance(method)) * value.abs().max()
                assert (found[name] - value).abs().max() <= limit, f"{kind} of {name} on {world_size} ranks"
