"""The Riemannian rules and the base optimizers in fp64, straight from their formulas, and factors to try them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsmoelora.adapters import Factor
from dsmoelora.optim import OptimConfig
from tests.riemannian_problems import Problem


def riemannian(
    config: OptimConfig, a: Any, b: Any, grad_a: Any, grad_b: Any, m: Any = None, grad_m: Any = None
) -> tuple[Any, ...]:
    """The new gradients of one expert's a (D, R), b (O, R) and, where there is one, mixer m (R, R); numpy fp64."""

    def damped(gram: Any) -> Any:
        return gram + (config.damping * np.trace(gram) / len(gram) + config.damping_abs) * np.eye(len(gram))

    def projector(factor: Any) -> Any:
        return factor @ np.linalg.solve(damped(factor.T @ factor), factor.T)

    share = {"scaled": 0.0, "tangent": 0.5 if m is None else 1.0}[config.preconditioner]
    mixer = np.eye(a.shape[1]) if m is None else m
    new_a = (grad_a - share * projector(a) @ grad_a) @ np.linalg.inv(damped(mixer @ b.T @ b @ mixer.T))
    new_b = (grad_b - share * projector(b) @ grad_b) @ np.linalg.inv(damped(mixer.T @ a.T @ a @ mixer))
    if m is None:
        return new_a, new_b
    return new_a, new_b, np.linalg.solve(damped(a.T @ a), grad_m) @ np.linalg.inv(damped(b.T @ b))


@dataclass
class BaseOptimizer:
    """AdamW (Loshchilov & Hutter) or SGD with momentum in fp64, for tensors by name."""

    config: OptimConfig
    step: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)

    def change(self, name: str, value: Any, grad: Any, lr: float) -> Any:
        """What step number `self.step` (from 1) adds to a value."""
        config = self.config
        if config.name == "sgd":
            self.first[name] = config.momentum * self.first.get(name, 0.0) + grad + config.weight_decay * value
            return -lr * self.first[name]
        beta1, beta2 = config.betas
        self.first[name] = beta1 * self.first.get(name, 0.0) + (1 - beta1) * grad
        self.second[name] = beta2 * self.second.get(name, 0.0) + (1 - beta2) * grad**2
        correction1, correction2 = (1 - beta**self.step if config.bias_correction else 1.0 for beta in config.betas)
        direction = (self.first[name] / correction1) / (np.sqrt(self.second[name] / correction2) + config.eps)
        return -lr * (direction + config.weight_decay * value)


def formula_gradients(config: OptimConfig, problem: Problem) -> dict[str, Tensor]:
    """The gradients of a problem after the rule, in fp64, by name; routers keep theirs."""
    new = {name: grad.double().clone() for name, grad in problem.grads.items()}
    for parts in problem.layers():
        names = [parts[factor].name for factor in (Factor.A, Factor.B, Factor.M) if factor in parts]
        for e in range(parts[Factor.A].shape[0]):
            a, b, *m = [problem.values[name][e].double().numpy() for name in names]
            grad_a, grad_b, *grad_m = [problem.grads[name][e].double().numpy() for name in names]
            for name, grad in zip(names, riemannian(config, a, b, grad_a, grad_b, *m, *grad_m), strict=True):
                new[name][e] = torch.from_numpy(grad)
    return new


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected number."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())
