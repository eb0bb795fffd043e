"""The preconditioned optimizer against formulas in fp64: the rules, an identity that they rest on, and their limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dsmoelora.adapters import Factor
from dsmoelora.optim import OptimConfig, ShardOptimizer, build_optimizer, trainables
from dsmoelora.optim.reference import precondition
from tests.riemannian_formula import BaseOptimizer, formula_gradients, relative_error
from tests.riemannian_problems import Network, Problem, as_problem, by_hand, random_problem, with_gradients

Rule = Literal["scaled", "tangent"]
RULES: list[Rule] = ["scaled", "tangent"]
GATE_POWERS = [1.0, 0.5, 0.0]
# Adam divides by gradients, and where they nearly vanish rounding decides: an eps near their size keeps that out.
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "lr_router": 0.02},
    "sgd-momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "lr_router": None},
    "adamw": {"name": "adamw", "lr": 0.1, "eps": 0.1, "weight_decay": 0.1, "lr_b_ratio": 3.0, "lr_router": 0.05},
    "adamw-short-memory": {"name": "adamw", "lr": 0.1, "eps": 0.1, "betas": (0.7, 0.8), "lr_router": 0.05},
    "adamw-uncorrected": {"name": "adamw", "lr": 0.1, "eps": 0.1, "bias_correction": False, "lr_router": None},
}


def learning_rate(config: OptimConfig, factor: Factor) -> float:
    router = config.lr if config.lr_router is None else config.lr_router
    return {Factor.B: config.lr * config.lr_b_ratio, Factor.ROUTER: router}.get(factor, config.lr)


def assert_steps_follow_the_formula(
    optimizer: ShardOptimizer, parameters: dict[str, nn.Parameter], problems: Iterable[Problem]
) -> None:
    """Take a step with the gradients of each problem; how far every tensor came is right within 1e-5."""
    config, base = optimizer.config, BaseOptimizer(optimizer.config)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    expected = {name: value.double() for name, value in start.items()}
    for problem in problems:
        base.step += 1
        new_grads = formula_gradients(config, replace(problem, values=expected))
        for of in problem.trainables:
            parameters[of.name].grad = problem.grads[of.name].clone()
            value, grad = expected[of.name].numpy(), new_grads[of.name].numpy()
            change = base.change(of.name, value, grad, learning_rate(config, of.factor))
            expected[of.name] = expected[of.name] + torch.from_numpy(change)
        optimizer.step()
    for name, parameter in parameters.items():
        moved = expected[name] - start[name]
        assert moved.abs().max() > 1e-2 * start[name].abs().max(), "far enough to be measured"
        assert relative_error(parameter.detach() - start[name], moved) <= 1e-5, name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("gate_power", GATE_POWERS)
@pytest.mark.parametrize("expert", ["lora", "moslora"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_on_a_network_follow_the_formula(rule: Rule, expert: str, gate_power: float, base: str) -> None:
    """Damping 0.1 and factors with far more rows than columns keep rounding small, so 1e-5 leaves room for no error.

    The first gradients are number 74: others bring some mixer near a singular one (0 to 2 do), where any rounding of
    an inverse in fp32, whichever way it is formed, is up to ten times as large.
    """
    config = OptimConfig(preconditioner=rule, damping=0.1, damping_abs=1e-3, **BASES[base])
    model = Network(gate_power=gate_power, expert=expert)
    optimizer = build_optimizer(model, config)

    def problems() -> Iterable[Problem]:
        for step in range(74, 77):
            model.set_gradients(step)
            yield as_problem(model)

    parameters = {of.name: parameter for of, parameter in trainables(model)}
    assert_steps_follow_the_formula(optimizer, parameters, problems())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_steps_with_mixers_follow_the_formula(rule: Rule, base: str) -> None:
    config = OptimConfig(preconditioner=rule, damping=0.1, damping_abs=1e-3, **BASES[base])
    start = random_problem([(40, 24), (24, 30)], num_experts=4, rank=3, mixers=True)
    optimizer, parameters = by_hand(start, config)

    def problems() -> Iterable[Problem]:
        for step in range(3):
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            yield with_gradients(replace(start, values=values), step)

    assert_steps_follow_the_formula(optimizer, parameters, problems())


@pytest.mark.parametrize("mixers", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_reference_follows_the_formula(rule: Rule, mixers: bool) -> None:
    """In fp64, where nothing hides behind rounding."""
    config = OptimConfig(preconditioner=rule, damping=1e-2, damping_abs=1e-6)
    problem = random_problem([(20, 16)], num_experts=4, rank=3, mixers=mixers)
    expected = formula_gradients(config, problem)
    (parts,) = problem.layers()
    names = [parts[factor].name for factor in (Factor.A, Factor.B, Factor.M) if factor in parts]
    (a, b, *m), (grad_a, grad_b, *grad_m) = (
        [tensors[name].double() for name in names] for tensors in (problem.values, problem.grads)
    )
    found = precondition(config, a, b, grad_a, grad_b, m[0] if mixers else None, grad_m[0] if mixers else None)
    for name, new in zip(names, found, strict=False):
        assert new is not None
        assert relative_error(new, expected[name]) <= 1e-12, name


@pytest.mark.parametrize("gate_power", GATE_POWERS)
def test_gradients_of_a_pair_agree_on_their_overlap(gate_power: float) -> None:
    """`a^T grad_a = (b^T grad_b)^T` for every power of the gate, since one weight enters both."""
    model = Network(gate_power=gate_power)
    model.set_gradients()
    problem = as_problem(model)
    for parts in problem.layers():
        cross = []
        for factor in (Factor.A, Factor.B):
            name = parts[factor].name
            cross.append(problem.values[name].double().mT @ problem.grads[name].double())
        assert relative_error(cross[0], cross[1].mT) <= 1e-5
        assert relative_error(cross[0], cross[1].mT.flip(0)) > 0.1, "experts differ"


@pytest.mark.parametrize("gate_power", GATE_POWERS)
def test_gradients_around_a_mixer_agree_on_their_overlaps(gate_power: float) -> None:
    """`a^T grad_a = grad_m m^T` and `b^T grad_b = grad_m^T m`, by autograd through one expert token by token."""
    generator = torch.Generator().manual_seed(0)
    x_TD, a_DR, b_OR, m_RR, away_TO, gate_T = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 7), (7, 3), (5, 3), (3, 3), (9, 5), (9,))
    )
    for factor in (a_DR, b_OR, m_RR):
        factor.requires_grad_()
    weighted_TO = (x_TD @ a_DR @ m_RR @ b_OR.T) * gate_T.abs().pow(gate_power)[:, None]
    grad_a, grad_b, grad_m = torch.autograd.grad((weighted_TO * away_TO).sum(), (a_DR, b_OR, m_RR))
    torch.testing.assert_close(a_DR.T @ grad_a, grad_m @ m_RR.T)
    torch.testing.assert_close(b_OR.T @ grad_b, grad_m.T @ m_RR)


def moves_of(model: Network, config: OptimConfig) -> dict[str, Tensor]:
    """How far one step takes every tensor."""
    model.set_gradients()
    start = as_problem(model).values
    build_optimizer(model, config).step()
    return {name: value - start[name] for name, value in as_problem(model).values.items()}


@pytest.mark.parametrize("rule", RULES)
def test_infinite_damping_is_sgd(rule: Rule) -> None:
    damped = OptimConfig(
        name="sgd", lr=0.1 * 1e8, lr_router=0.1, preconditioner=rule, damping=0.0, damping_abs=1e8, momentum=0.0
    )
    expected = moves_of(Network(), OptimConfig(name="sgd", lr=0.1, lr_router=0.1))
    for name, moved in moves_of(Network(), damped).items():
        assert relative_error(moved, expected[name]) <= 1e-5, name


def change_of_products(model: Network, config: OptimConfig) -> list[Tensor]:
    """The first-order change of every layer's `a b^T`, (E, D, O)."""
    model.set_gradients()
    before, moved = as_problem(model), moves_of(model, config)
    changes = []
    for parts in before.layers():
        a, b = parts[Factor.A].name, parts[Factor.B].name
        changes.append(moved[a] @ before.values[b].mT + before.values[a] @ moved[b].mT)
    return changes


@pytest.mark.parametrize("ratio", [1e-2, 1e2])
@pytest.mark.parametrize(("rule", "tolerance"), [("scaled", 1e-5), ("tangent", 1e-5), ("none", None)])
def test_the_change_of_the_product_does_not_depend_on_its_factors(
    rule: Any, tolerance: float | None, ratio: float
) -> None:
    """`(a c, b / c)` is the same model and takes the same step; under plain SGD one factor runs off."""
    damping = {} if rule == "none" else {"damping": 0.1, "damping_abs": 0.0}
    config = OptimConfig(name="sgd", lr=1.0, preconditioner=rule, **damping)
    expected = change_of_products(Network(), config)
    rescaled = Network()
    for of, parameter in trainables(rescaled):
        if of.factor is not Factor.ROUTER:
            parameter.data *= {Factor.A: ratio, Factor.B: 1 / ratio}[of.factor]
    for found, change in zip(change_of_products(rescaled, config), expected, strict=True):
        if tolerance is None:
            assert relative_error(found, change) > 10
        else:
            assert relative_error(found, change) <= tolerance
