"""The Riemannian rules on one device, written to be read: what the sharded step must equal.

One expert after another, whole matrices, no batching. Tests compare it with formulas and the sharded step with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoelora.config import OptimConfig


def precondition(
    config: OptimConfig, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, m: Tensor | None, grad_m: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """New gradients of the factors of one layer; formulas in `riemannian`.

    Args:
        config: rule and damping
        a, grad_a: (E, D, R)
        b, grad_b: (E, O, R)
        m, grad_m: (E, R, R) or None
    """
    new_a, new_b, new_m = torch.empty_like(a), torch.empty_like(b), None if m is None else torch.empty_like(m)
    for e in range(len(a)):
        mixer = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) if m is None else m[e]
        gram_a, gram_b = a[e].T @ a[e], b[e].T @ b[e]
        along_a, along_b = grad_a[e], grad_b[e]
        if config.preconditioner == "tangent":
            share = 0.5 if m is None else 1.0  # the mixer takes the overlap itself
            along_a = along_a - share * a[e] @ damped_inverse(gram_a, config) @ (a[e].T @ grad_a[e])
            along_b = along_b - share * b[e] @ damped_inverse(gram_b, config) @ (b[e].T @ grad_b[e])
        new_a[e] = along_a @ damped_inverse(mixer @ gram_b @ mixer.T, config)
        new_b[e] = along_b @ damped_inverse(mixer.T @ gram_a @ mixer, config)
        if new_m is not None and grad_m is not None:
            new_m[e] = damped_inverse(gram_a, config) @ grad_m[e] @ damped_inverse(gram_b, config)
    return new_a, new_b, new_m


def damped_inverse(gram: Tensor, config: OptimConfig) -> Tensor:
    """`(G + d I)^-1` with `d = damping * trace(G) / R + damping_abs`, (R, R)."""
    damping = config.damping * gram.trace() / len(gram) + config.damping_abs
    return torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
