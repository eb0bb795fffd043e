"""Factors with gradients to precondition: those of a small network, and others made by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import Factor, adapted_layers
from dsmoelora.optim import OptimConfig, ShardGroup, ShardOptimizer, Trainable, trainables
from dsmoelora.optim.rows import whole


@dataclass(frozen=True)
class Problem:
    """Factors of a few layers, and gradients as they follow from one matrix a layer and expert: `grad_a = G b m^T` ...

    Args:
        trainables: all of them, layer by layer
        values, grads: by name
    """

    trainables: list[Trainable]
    values: dict[str, Tensor]
    grads: dict[str, Tensor]

    def layers(self) -> list[dict[Factor, Trainable]]:
        """The trainables of each layer by role."""
        found: dict[str, dict[Factor, Trainable]] = {}
        for each in self.trainables:
            found.setdefault(each.layer, {})[each.factor] = each
        return list(found.values())


def random_problem(
    sizes: list[tuple[int, int]], *, num_experts: int, rank: int, mixers: bool = False, seed: int = 0
) -> Problem:
    """Normal numbers, whose Gram matrices are well-conditioned where there are many more rows than columns.

    Args:
        sizes: (D, O) of each layer
        num_experts: of each layer
        rank: R
        mixers: whether the layers have some (near the identity, for the condition's sake)
        seed: of the numbers
    """
    generator = torch.Generator().manual_seed(seed)
    of_all: list[Trainable] = []
    values: dict[str, Tensor] = {}
    for number, (num_inputs, num_outputs) in enumerate(sizes):
        layer = f"layers.{number}.proj"
        shapes = {
            Factor.A: (num_experts, num_inputs, rank),
            Factor.B: (num_experts, num_outputs, rank),
            Factor.M: (num_experts, rank, rank),
            Factor.ROUTER: (num_experts, num_inputs),
        }
        for factor, shape in shapes.items():
            if mixers or factor is not Factor.M:
                each = Trainable(f"{layer}.{factor.value}", layer, factor, shape)
                of_all.append(each)
                values[each.name] = torch.randn(shape, generator=generator)
                if factor is Factor.M:
                    values[each.name] = torch.eye(rank) + 0.2 * values[each.name]
    return with_gradients(Problem(of_all, values, {}), seed)


def with_gradients(problem: Problem, seed: int) -> Problem:
    """The same values with gradients that follow from a random matrix G of each layer and expert."""
    generator = torch.Generator().manual_seed(seed)
    grads: dict[str, Tensor] = {}
    for parts in problem.layers():
        a, b = (problem.values[parts[factor].name] for factor in (Factor.A, Factor.B))
        m = problem.values[parts[Factor.M].name] if Factor.M in parts else torch.eye(a.shape[-1]).expand(len(a), -1, -1)
        grad = torch.randn(len(a), a.shape[1], b.shape[1], generator=generator)
        of_factor = {Factor.A: grad @ b @ m.mT, Factor.B: grad.mT @ a @ m, Factor.M: a.mT @ grad @ b}
        of_factor[Factor.ROUTER] = torch.randn(a.shape[:2], generator=generator)
        grads |= {each.name: of_factor[factor] for factor, each in parts.items()}
    return replace(problem, grads=grads)


class Network(nn.Module):
    """Two layers with a few experts each, whose b is not zero any more, and mixers near the identity if they have some.

    Args:
        adapter: settings beside the defaults below
    """

    def __init__(self, **adapter: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"r": 3, "num_experts": 4, "top_k": 2, "target_modules": ["up", "down"]} | adapter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(40, 24), nn.Linear(24, 30)
            inject(self, AdapterConfig(**settings))
            for _, layer in adapted_layers(self):
                nn.init.normal_(layer.experts.b, std=0.3)
                if layer.experts.m is not None:
                    with torch.no_grad():
                        layer.experts.m.normal_(std=0.2).add_(torch.eye(layer.experts.m.shape[-1]))

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.up(x_TD).tanh())
        return hidden

    def set_gradients(self, step: int = 0) -> None:
        """Those of a regression on this step's random numbers."""
        generator = torch.Generator().manual_seed(step)
        x_TD, y_TO = torch.randn(64, 40, generator=generator), torch.randn(64, 30, generator=generator)
        self.zero_grad()
        (self(x_TD) - y_TO).square().sum(-1).mean().backward()


def as_problem(model: nn.Module) -> Problem:
    """The trainable tensors and gradients of a model as they are now."""
    found = trainables(model)
    values = {of.name: parameter.detach().clone() for of, parameter in found}
    grads = {of.name: parameter.grad.clone() for of, parameter in found if parameter.grad is not None}
    return Problem([of for of, _ in found], values, grads)


def by_hand(problem: Problem, config: OptimConfig) -> tuple[ShardOptimizer, dict[str, nn.Parameter]]:
    """An optimizer over tensors that no layer holds."""
    parameters = {name: nn.Parameter(value.clone()) for name, value in problem.values.items()}
    optimizer = ShardOptimizer([(of, parameters[of.name]) for of in problem.trainables], config)
    optimizer.bind([ShardGroup(problem.trainables, [whole(of, parameters[of.name]) for of in problem.trainables])])
    return optimizer, parameters
