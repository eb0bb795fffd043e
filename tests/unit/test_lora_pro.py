"""LoRA-Pro's step, by the formula of its authors, against ours: what it does to the weight is the tangent step's work.

Wang et al. 2024 (arXiv 2407.18242), as in `peta/optim.py` of their release: `W = W0 + s B A`, B (O, R), A (R, D).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsmoelora.optim import OptimConfig
from dsmoelora.optim.reference import precondition

NUM_OUT, NUM_IN, RANK, SCALE = 7, 9, 3, 2.5


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the gradient of W, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((RANK, NUM_IN), (NUM_OUT, RANK), (NUM_OUT, NUM_IN))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def lora_pro(a: Tensor, b: Tensor, grad_w: Tensor, free: str) -> tuple[Tensor, Tensor]:
    """The gradients that LoRA-Pro puts in the place of those of A and B.

    Args:
        a, b: factors
        grad_w: gradient of W
        free: which X, for the step of W is the same for all: `sylvester`, the authors' choice, or `zero`
    """
    grad_a, grad_b = SCALE * b.T @ grad_w, SCALE * grad_w @ a.T
    gram_a, gram_b = a @ a.T, b.T @ b
    x = torch.zeros_like(gram_a)
    if free == "sylvester":  # B^T B X + X A A^T = -(1 / s^2) (B^T B)^-1 grad_A A^T
        right = -torch.linalg.inv(gram_b) @ grad_a @ a.T / SCALE**2
        eye = torch.eye(RANK, dtype=a.dtype)
        system = torch.kron(gram_b.contiguous(), eye) + torch.kron(eye, gram_a.T.contiguous())
        x = torch.linalg.solve(system, right.flatten()).reshape(right.shape)
    outside = torch.eye(NUM_OUT, dtype=b.dtype) - b @ torch.linalg.inv(gram_b) @ b.T
    new_a = torch.linalg.inv(gram_b) @ grad_a / SCALE**2 + x @ a
    new_b = outside @ grad_b @ torch.linalg.inv(gram_a) / SCALE**2 - b @ x
    return new_a, new_b


def tangent(a: Tensor, b: Tensor, grad_w: Tensor) -> tuple[Tensor, Tensor]:
    """What `optim.preconditioner: tangent` makes of the gradients of A and B."""
    config = OptimConfig(name="sgd", preconditioner="tangent", damping=0.0, damping_abs=0.0)
    grad_a, grad_b = SCALE * b.T @ grad_w, SCALE * grad_w @ a.T
    found_a, found_b, _ = precondition(config, a.T[None], b[None], grad_a.T[None], grad_b[None], None, None)
    return found_a[0].T, found_b[0]


def weight_step(a: Tensor, b: Tensor, grads: tuple[Tensor, Tensor], lr: float) -> Tensor:
    """What a step of SGD on both factors does to W."""
    return SCALE * ((b - lr * grads[1]) @ (a - lr * grads[0]) - b @ a)


@pytest.mark.parametrize("free", ["sylvester", "zero"])
def test_the_weight_moves_as_lora_pro_moves_it_to_first_order_for_lr_over_s_squared(free: str) -> None:
    a, b, grad_w = problem()
    theirs, ours = lora_pro(a, b, grad_w, free), tangent(a, b, grad_w)
    first_order = SCALE * (b @ theirs[0] + theirs[1] @ a)
    torch.testing.assert_close(SCALE * (b @ ours[0] + ours[1] @ a) / SCALE**2, first_order, rtol=1e-11, atol=1e-11)
    # both are the projection of the gradient on what rank-R matrices can do here, counted once
    onto_b, onto_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    projected = onto_b @ grad_w + grad_w @ onto_a - onto_b @ grad_w @ onto_a
    torch.testing.assert_close(first_order, projected, rtol=1e-11, atol=1e-11)

    def apart(lr: float) -> float:
        return float((weight_step(a, b, theirs, lr) - weight_step(a, b, ours, lr / SCALE**2)).norm())

    assert apart(1e-4) / apart(1e-3) == pytest.approx(1e-2, rel=1e-3), "what differs is of second order"
    assert not torch.allclose(theirs[0], ours[0] / SCALE**2, rtol=1e-2), "factors move in another way"
