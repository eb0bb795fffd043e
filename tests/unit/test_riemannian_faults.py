"""Preconditioning in bad cases: Gram matrices that cannot be inverted, factors without partners, routers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoelora.adapters import Factor
from dsmoelora.optim import OptimConfig, ShardGroup, ShardOptimizer, build_optimizer, trainables
from dsmoelora.optim.riemannian import damped_inverse
from dsmoelora.optim.rows import whole
from tests.host_waits import host_reads
from tests.riemannian_formula import relative_error
from tests.riemannian_problems import Network, Problem, as_problem, by_hand, random_problem

UNDAMPED = OptimConfig(name="sgd", lr=1.0, preconditioner="scaled", damping=0.0, damping_abs=0.0)


def step_of(problem: Problem, config: OptimConfig) -> tuple[ShardOptimizer, dict[str, torch.Tensor]]:
    """An optimizer after one step, and how far every tensor came."""
    optimizer, parameters = by_hand(problem, config)
    for name, parameter in parameters.items():
        parameter.grad = problem.grads[name].clone()
    optimizer.step()
    return optimizer, {name: value.detach() - problem.values[name] for name, value in parameters.items()}


def test_singular_matrices_are_counted_and_take_the_pseudo_inverse() -> None:
    """One expert's b is zero, as at the start of a training; another's columns are all equal; two are as usual."""
    problem = random_problem([(20, 16)], num_experts=4, rank=2)
    ((parts),) = problem.layers()
    a, b = parts[Factor.A].name, parts[Factor.B].name
    problem.values[b][0] = 0.0
    problem.values[b][1] = 1.0  # b^T b is 16 everywhere, and its rank 1 to the last bit
    optimizer, moved = step_of(problem, UNDAMPED)
    (report,) = optimizer.reports
    assert report.num_fallbacks == 2
    for e in range(4):
        gram_a, gram_b = (problem.values[name][e].double().T @ problem.values[name][e].double() for name in (a, b))
        expected_a = -problem.grads[a][e].double() @ torch.linalg.pinv(gram_b)
        expected_b = -problem.grads[b][e].double() @ torch.linalg.inv(gram_a)
        assert (moved[a][e] - expected_a).abs().max() <= 1e-5 * expected_a.abs().max(), "0 where b is 0"
        assert relative_error(moved[b][e], expected_b) <= 1e-5
    assert not moved[a][0].any()
    assert moved[a][1].any()


@pytest.mark.parametrize("damping", [{"damping": 1e-2}, {"damping_abs": 1e-2}])
def test_damping_makes_fallbacks_needless(damping: dict[str, Any]) -> None:
    problem = random_problem([(20, 16)], num_experts=4, rank=2)
    ((parts),) = problem.layers()
    problem.values[parts[Factor.B].name][1] = 1.0
    config = replace(UNDAMPED, preconditioner="tangent", **damping)
    optimizer, moved = step_of(problem, config)
    assert optimizer.reports[0].num_fallbacks == 0
    assert all(change.isfinite().all() for change in moved.values())


def test_the_condition_is_estimated_from_below() -> None:
    """Rotated matrices of known condition number; without a rotation the estimate is exact."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(6):
        eigenvalues = torch.logspace(0, -exponent, 5, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
        rotated = (rotation * eigenvalues) @ rotation.T
        _, condition, num_fallbacks = damped_inverse(rotated[None], UNDAMPED)
        assert num_fallbacks == 0
        assert 1.0 <= condition <= np.linalg.cond(rotated.numpy()) * (1 + 1e-9)
        _, condition, _ = damped_inverse(torch.stack((torch.eye(5).double(), eigenvalues.diag())), UNDAMPED)
        assert condition == pytest.approx(10.0**exponent), "the largest of all matrices"


def test_what_no_damping_mends_is_counted_without_waiting() -> None:
    """No Gram matrix is one: with eigenvalues 3 and -1, or not finite. Never the identity in silence."""
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    grams = torch.stack((indefinite, torch.full((2, 2), torch.nan), torch.eye(2)))
    with host_reads() as reads:
        inverse, _, num_failed = damped_inverse(grams, replace(UNDAMPED, damping=0.25, damping_abs=0.25))
    assert reads == []
    assert num_failed == 2
    assert inverse[0] == pytest.approx(torch.eye(2) / 1.5), "of the mean eigenvalue and the damping"
    assert inverse[1].isnan().all()
    assert inverse[2] == pytest.approx(torch.eye(2) / 1.5)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_inverse_is_as_exact_as_the_condition_allows(rank: int) -> None:
    """An inverse is off by the condition number times the rounding of fp32; it is symmetric to the last bit."""
    generator = torch.Generator().manual_seed(0)
    factor_NXR = torch.randn(50, 2 * rank, rank, generator=generator)
    gram_NRR = factor_NXR.mT @ factor_NXR
    inverse, _, num_fallbacks = damped_inverse(gram_NRR, UNDAMPED)
    expected = torch.linalg.inv(gram_NRR.double())
    error_N = torch.linalg.matrix_norm(inverse - expected) / torch.linalg.matrix_norm(expected)
    assert num_fallbacks == 0
    assert (error_N <= 4 * torch.linalg.cond(gram_NRR.double()) * torch.finfo(torch.float32).eps).all()
    assert torch.equal(inverse, inverse.mT)


def test_inverting_takes_as_many_operations_for_many_matrices_as_for_one() -> None:
    """None of them is the batched `cholesky_inverse`, a loop over matrices inside the solver library."""
    one, many = Operators(), Operators()
    for recorder, count in ((one, 1), (many, 100)):
        gram = torch.eye(3).repeat(count, 1, 1)
        with recorder:
            damped_inverse(gram, UNDAMPED)
    assert one.names == many.names
    assert "cholesky_inverse" not in many.names and "linalg_solve_triangular" in many.names


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_report_has_the_norm_and_the_condition_of_the_step() -> None:
    problem = random_problem([(20, 16)], num_experts=4, rank=3)
    config = OptimConfig(name="sgd", lr=10.0, lr_router=None, preconditioner="tangent", damping=0.1)
    optimizer, moved = step_of(problem, config)
    (report,) = optimizer.reports
    norm = torch.cat([change.flatten() for change in moved.values()]).norm().item()
    assert 10.0 * report.square_norm.item() ** 0.5 == pytest.approx(norm, rel=1e-5)
    factors = [value.double() for of, value in zip(problem.trainables, problem.values.values(), strict=True)][:2]
    grams = torch.cat([factor.mT @ factor for factor in factors])
    damped = grams + (0.1 * grams.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-6)[:, None, None] * torch.eye(3).double()
    assert 1.0 < report.condition.item() <= float(torch.linalg.cond(damped).max()) * (1 + 1e-5)


@pytest.mark.parametrize("missing", [Factor.A, Factor.B])
def test_a_factor_without_its_partner_is_an_error(missing: Factor) -> None:
    problem = random_problem([(8, 6), (6, 8)], num_experts=2, rank=2)
    found = [of for of in problem.trainables if (of.layer, of.factor) != ("layers.1.proj", missing)]
    with pytest.raises(ValueError, match=rf"layers\.1\.proj has [ab] but no {missing.value}"):
        by_hand(Problem(found, problem.values, problem.grads), UNDAMPED)


def test_a_model_without_factors_is_an_error() -> None:
    problem = random_problem([(8, 6)], num_experts=2, rank=2)
    routers = [of for of in problem.trainables if of.factor is Factor.ROUTER]
    with pytest.raises(ValueError, match="no pair"):
        by_hand(Problem(routers, problem.values, problem.grads), UNDAMPED)


def test_master_values_must_be_fp32() -> None:
    found = trainables(Network().to(torch.bfloat16))
    optimizer = ShardOptimizer(found, UNDAMPED)
    shards = [whole(trainable, parameter) for trainable, parameter in found]
    with pytest.raises(ValueError, match=r"bfloat16.*fp32"):
        optimizer.bind([ShardGroup(optimizer.trainables, shards)])


@pytest.mark.parametrize("rule", ["none", "scaled"])
def test_the_limit_for_routers_clips_routers_alone(rule: Any) -> None:
    """All routers together, by one number; the factors take the same step as without the limit."""
    free, limited = Network(), Network()
    for model, limit in ((free, None), (limited, 1e-2)):
        config = OptimConfig(
            name="sgd",
            lr=1.0,
            lr_router=None,
            preconditioner=rule,
            max_grad_norm_router=limit,
        )
        model.set_gradients()
        build_optimizer(model, config).step()
    start = as_problem(Network()).values
    free_moves, limited_moves = (
        {name: value - start[name] for name, value in as_problem(model).values.items()} for model in (free, limited)
    )
    routers = [of.name for of, _ in trainables(free) if of.factor is Factor.ROUTER]
    for name in set(start) - set(routers):
        assert torch.equal(free_moves[name], limited_moves[name]), name
    norm = torch.cat([free_moves[name].flatten() for name in routers]).norm()
    assert norm > 0.1
    for name in routers:
        assert relative_error(limited_moves[name], free_moves[name] * 1e-2 / norm) <= 1e-3, name


def test_routers_below_the_limit_stay_as_they_are() -> None:
    free, limited = Network(), Network()
    for model, limit in ((free, None), (limited, 1e3)):
        model.set_gradients()
        build_optimizer(model, OptimConfig(name="sgd", lr_router=None, max_grad_norm_router=limit)).step()
    expected = as_problem(free).values
    assert all(torch.equal(value, expected[name]) for name, value in as_problem(limited).values.items())
