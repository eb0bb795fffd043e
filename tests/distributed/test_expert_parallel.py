"""Training with partitioned experts gives the numbers of one device, wherever the experts lie and tokens travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmoelora.config import Recipe
from tests.conftest import PoolFactory, release, thorough
from tests.counted_training import train_and_count
from tests.engine_ranks import Job, Pieces, assert_parity, batches_of, build_engine, numbers_of, train_on_rank
from tests.expert_parallel import MAX_STEPS, NUM_EXPERTS, RANK, SEEDS, TARGETS, on_one_device, partitioned, recipe_of
from tests.plain_training import Training, make_base, make_recipe, micro_batch


def weight_tolerance(method: str) -> float:
    """Adam turns rounding noise in tiny gradients into steps of the size of the learning rate."""
    return 1e-4 if method.startswith("adamw") else 1e-5


@dataclass
class Reference:
    """What one device makes of a method, and the norm of the gradient that its base optimizer saw at each step."""

    recipe: Recipe
    training: Training
    norms: list[float]


Plainly = Callable[[str], Reference]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Plainly:
    base = make_base(tmp_path_factory.mktemp("base"))
    trained: dict[str, Reference] = {}

    def get(method: str) -> Reference:
        if method not in trained:
            recipe = recipe_of(base, method)
            trained[method] = Reference(recipe, *on_one_device(recipe))
        return trained[method]

    return get


@pytest.mark.parametrize("method", SEEDS)
def test_the_reference_learns_and_no_token_is_near_a_border(plainly: Plainly, method: str) -> None:
    """What the comparisons below rest on."""
    expected = plainly(method).training
    assert expected.smallest_gap > 1e-4
    assert expected.final_loss < 0.98 * expected.losses[0]


class Case(NamedTuple):
    """One training; with ep_size 1 no tokens travel and the exchange means nothing."""

    ranks: tuple[int, int]  # world size and ep_size
    optimizer: str
    preconditioner: str
    exchange: Any
    accumulation: int
    checkpointing: bool


# Of the 192 cases twelve in which every pair of settings occurs.
CASES = [
    Case((4, 1), "sgd", "none", "auto", 1, False),
    Case((4, 1), "sgd", "scaled", "auto", 2, True),
    Case((4, 1), "adamw", "tangent", "auto", 2, True),
    Case((4, 2), "adamw", "none", "all_to_all", 2, True),
    Case((4, 2), "adamw", "scaled", "all_to_all", 1, False),
    Case((4, 2), "sgd", "tangent", "gather", 1, True),
    Case((4, 4), "sgd", "none", "gather", 2, False),
    Case((4, 4), "sgd", "scaled", "gather", 2, True),
    Case((4, 4), "adamw", "tangent", "all_to_all", 1, False),
    Case((6, 3), "adamw", "none", "gather", 2, True),
    Case((6, 3), "sgd", "scaled", "gather", 2, False),
    Case((6, 3), "sgd", "tangent", "all_to_all", 1, False),
]


def test_every_pair_of_settings_occurs() -> None:
    settings: dict[str, tuple[Any, ...]] = {
        "ranks": ((4, 1), (4, 2), (4, 4), (6, 3)),
        "optimizer": ("sgd", "adamw"),
        "preconditioner": ("none", "scaled", "tangent"),
        "exchange": ("gather", "all_to_all"),
        "accumulation": (1, 2),
        "checkpointing": (False, True),
    }
    assert tuple(settings) == Case._fields
    for one, other in combinations(settings, 2):
        wanted = set(product(settings[one], settings[other]))
        if (one, other) == ("ranks", "exchange"):
            wanted -= set(product([(4, 1)], settings["exchange"]))
        assert wanted <= {(getattr(case, one), getattr(case, other)) for case in CASES}, f"{one} and {other}"


# At each commit each kind of placement with both optimizers and all rules; a placement on one rank is ZeRO-3's own.
LATER = [CASES[1], CASES[2], CASES[7], CASES[10], CASES[11]]


def test_every_setting_occurs_at_each_commit() -> None:
    cases = [case for case in CASES if case not in LATER]
    for setting in Case._fields:
        assert {getattr(case, setting) for case in cases} == {getattr(case, setting) for case in CASES}


@pytest.mark.parametrize(
    "case",
    [thorough(case) if case in LATER else case for case in CASES],
    ids=lambda case: "-".join(str(each).replace(" ", "") for each in case),
)
def test_placement_and_exchange_change_nothing(worker_pool: PoolFactory, plainly: Plainly, case: Case) -> None:
    method = f"{case.optimizer}-{case.preconditioner}"
    reference = plainly(method)
    (world_size, ep_size), train = case.ranks, reference.recipe.train
    recipe = replace(reference.recipe, train=replace(train, activation_checkpointing=case.checkpointing))
    job = Job(partitioned(recipe, ep_size, case.exchange), case.accumulation)
    assert_parity(worker_pool(world_size).run(train_on_rank, job), reference.training, weight_tolerance(method))


@pytest.mark.parametrize(
    ("ep_size", "exchange", "settings"),
    [
        pytest.param(2, "all_to_all", {"zero": {"offload_optimizer": {"device": "cpu"}}}, id="optimizer-offloaded"),
        pytest.param(2, "gather", {"partitioned": False}, id="model-not-partitioned", marks=release),
        pytest.param(4, "all_to_all", {"partitioned": False, "accumulation": 2}, id="not-partitioned-four"),
        # the second rank has nothing to learn from, the last one row, and the third most tokens
        pytest.param(4, "all_to_all", {"rows": (6, 3, 38, 1)}, id="uneven-all-to-all"),
        pytest.param(2, "gather", {"rows": (6, 3, 38, 1)}, id="uneven-gather", marks=release),
    ],
)
def test_ways_of_zero_and_uneven_batches_change_nothing(
    worker_pool: PoolFactory, plainly: Plainly, ep_size: int, exchange: Any, settings: dict[str, Any]
) -> None:
    assert micro_batch(0, slice(6, 6 + 3)).num_supervised_local == 0
    reference = plainly("adamw-tangent")
    shares = worker_pool(4).run(train_on_rank, Job(partitioned(reference.recipe, ep_size, exchange), **settings))
    assert_parity(shares, reference.training, weight_tolerance("adamw"))


@pytest.mark.parametrize(("ep_size", "exchange"), [thorough(2, "gather"), (4, "all_to_all")])
def test_bf16_stays_within_two_percent_of_fp32(
    worker_pool: PoolFactory, plainly: Plainly, ep_size: int, exchange: Any
) -> None:
    reference = plainly("adamw-scaled")
    expected = [*reference.training.losses, reference.training.final_loss]
    recipe = replace(reference.recipe, model=replace(reference.recipe.model, dtype="bf16"))
    for share in worker_pool(4).run(train_on_rank, Job(partitioned(recipe, ep_size, exchange))):
        torch.testing.assert_close([*share.losses, share.final_loss], expected, rtol=0.02, atol=0)


def train_with_one_expert(job: Job, expert: int) -> list[float]:
    """Losses of three steps in which every layer sends every token to the same expert."""
    from dsmoelora.adapters import adapted_layers

    def to_one(_: Any, __: Any, gate_TE: Tensor) -> Tensor:
        only_TE = torch.zeros_like(gate_TE)
        only_TE[:, expert] = gate_TE.sum(-1)
        return only_TE

    engine = build_engine(job)
    for _, layer in adapted_layers(engine.model):
        layer.router.register_forward_hook(to_one)
        layer.context.hooked = True
    return [engine.train_step(batches_of(job, step)).loss for step in range(3)]


def test_one_expert_may_get_all_tokens(worker_pool: PoolFactory, plainly: Plainly) -> None:
    """The other ranks get none; losses are those of experts that every rank has."""
    recipe = plainly("sgd-none").recipe
    expected = worker_pool(2).run(train_with_one_expert, Job(recipe), NUM_EXPERTS - 1)[0]
    assert expected[-1] < expected[0]
    for ep_size, exchange in ((4, "all_to_all"), (4, "gather"), (2, "all_to_all")):
        job = Job(partitioned(recipe, ep_size, exchange))  # type: ignore[arg-type]
        for losses in worker_pool(4).run(train_with_one_expert, job, NUM_EXPERTS - 1):
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def train_with_a_bad_gradient(job: Job) -> tuple[list[bool], list[dict[str, Pieces]]]:
    """Three steps, the second with a gradient that is not finite in the experts of one rank, and nowhere else."""
    from dsmoelora.adapters import adapted_layers
    from dsmoelora.parallel import comm

    engine = build_engine(job)
    if comm.rank() == 1:
        _, layer = next(adapted_layers(engine.model))
        layer.experts.a.register_hook(lambda grad: grad * (torch.inf if engine.step == 1 else 1.0))
    skipped, numbers = [], []
    for step in range(3):
        skipped.append(engine.train_step(batches_of(job, step)).skipped)
        numbers.append(numbers_of(engine))
    return skipped, numbers


@pytest.mark.parametrize(("ep_size", "method"), [(4, "sgd-scaled"), (2, "adamw-tangent")])
def test_a_bad_gradient_in_the_experts_of_one_rank_moves_nothing_on_any(
    worker_pool: PoolFactory, plainly: Plainly, ep_size: int, method: str
) -> None:
    recipe = partitioned(plainly(method).recipe, ep_size)
    recipe = replace(recipe, optim=replace(recipe.optim, warmup_steps=0))
    for skipped, (before, after_bad, after_next) in worker_pool(4).run(train_with_a_bad_gradient, Job(recipe)):
        assert skipped == [False, True, False]
        for kind, tensors in before.items():
            for name, pieces in tensors.items():
                for (*_, old), (*_, kept), (*_, new) in zip(
                    pieces, after_bad[kind][name], after_next[kind][name], strict=True
                ):
                    assert torch.equal(old, kept), f"{kind} of {name}"
                    assert new.isfinite().all() and not torch.equal(kept, new), f"{kind} of {name}"


def error_of_engine_without_placement(job: Job) -> str:
    from unittest import mock

    from dsmoelora.errors import ConfigError
    from dsmoelora.parallel import zero

    with mock.patch.object(zero, "place_experts"):
        try:
            build_engine(job)
        except ConfigError as error:
            return str(error)
    return "none"


def test_experts_that_zero_did_not_place_are_noticed(worker_pool: PoolFactory, plainly: Plainly) -> None:
    """ZeRO would average gradients of different experts, and nothing would look wrong."""
    job = Job(partitioned(plainly("sgd-none").recipe, 2))
    for message in worker_pool(4).run(error_of_engine_without_placement, job):
        assert "experts.a" in message and "expert-data-parallel group" in message


# Matrices of an expert in a step: a^T a, b^T b, and a^T grad_a for `tangent` alone.
NUM_MATRICES = {"scaled": 2, "tangent": 3}


@pytest.mark.parametrize(("ep_size", "method"), [(2, "adamw-tangent"), thorough(2, "sgd-scaled"), (4, "sgd-tangent")])
def test_preconditioning_stays_in_the_expert_data_parallel_group(
    worker_pool: PoolFactory, plainly: Plainly, ep_size: int, method: str
) -> None:
    """One all-reduce of the local experts' matrices among the ranks that share them; none where one rank has them."""
    reference = plainly(method)
    num_bytes = 4 * NUM_MATRICES[reference.recipe.optim.preconditioner] * RANK**2
    num_bytes *= len(TARGETS) * NUM_EXPERTS // ep_size
    job = Job(partitioned(reference.recipe, ep_size), accumulation=2)
    for rank, counts in enumerate(worker_pool(4).run(train_and_count, job)):
        assert counts.num_applied == MAX_STEPS, "once a step"
        assert len(counts.collectives) == 2 * MAX_STEPS, "ZeRO steps the experts' group and the routers' group"
        of_steps = [found for found in counts.collectives if found]
        assert len(of_steps) == (MAX_STEPS if ep_size < 4 else 0)
        for found in of_steps:
            assert [(each.name, each.num_bytes) for each in found] == [("allreduce_.default", num_bytes)]
            assert found[0].ranks == list(range(rank % ep_size, 4, ep_size))
        for report, norm in zip(counts.reports, reference.norms, strict=True):
            assert report["preconditioned_norm"] == pytest.approx(norm, rel=1e-4)
            assert report["condition"] >= 1.0
            assert report["eigh_fallbacks"] == 0.0


ODD = {"num_experts": 6, "top_k": 6, "r": RANK, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def test_rows_that_are_cut_travel_in_their_own_group(worker_pool: PoolFactory, tmp_path: Path) -> None:
    """Three experts with 51 rows on two ranks: each group of theirs has a cut row of its own, in down_proj's a."""
    base = make_base(tmp_path, intermediate_size=51)
    optim = {"name": "sgd", "lr": 0.1, "preconditioner": "tangent", "damping": 0.1, "max_grad_norm": 0.5}
    recipe = make_recipe(base, adapter=ODD, optim=optim, max_steps=MAX_STEPS)
    expected, _ = on_one_device(recipe)
    job = Job(partitioned(recipe, 2))
    assert_parity(worker_pool(4).run(train_on_rank, job), expected, weight_tolerance("sgd"))
    num_bytes = 4 * (NUM_MATRICES["tangent"] * 3 * 3 * RANK**2 + 2 * RANK)  # three layers, three experts, one row
    for counts in worker_pool(4).run(train_and_count, job):
        assert [each.num_bytes for found in counts.collectives for each in found] == [num_bytes] * MAX_STEPS
