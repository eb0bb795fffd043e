"""The R x R part of the Riemannian rules: what each row of a factor's gradient is multiplied with.

For one expert with factors a (D, R), b (O, R), optional mixer m (R, R), `G_a = a^T a`, `G_b = b^T b` and `[X]` short
for the damped inverse `(X + d I)^-1`, `d = damping * trace(X) / R + damping_abs`:

    scaled            grad_a [G_b]                          grad_b [G_a]
    tangent           (grad_a - 1/2 a [G_a] C) [G_b]        (grad_b - 1/2 b [G_b] C^T) [G_a]          C = a^T grad_a
    scaled,  mixer    grad_a [m G_b m^T]                    grad_b [m^T G_a m]                  [G_a] grad_m [G_b]
    tangent, mixer    (grad_a - a [G_a] grad_m m^T) [m G_b m^T]   (grad_b - b [G_b] grad_m^T m) [m^T G_a m]   same

`scaled` is Zhang & Pilanci 2024 (arXiv 2402.02347), per expert as in Sun et al. 2025 (arXiv 2502.15828); `tangent`
projects onto the tangent space of the fixed-rank manifold (Takeda et al., *A Riemannian Geometry for Low-rank
Adaptation*), which counts what both factors could express once and not twice. Every rule has the form
`grad <- grad P - factor Q`, so a row needs nothing but its own expert's P and Q. Without a mixer `C^T = b^T grad_b`,
and with one `a^T grad_a = grad_m m^T` and `b^T grad_b = grad_m^T m`: no cross product with b is ever needed.

All tensors are (S, R, R) fp32, one matrix for each of S pairs (a_e, b_e).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.config import OptimConfig


@dataclass
class Mixers:
    """Mixers and their gradients, (S, R, R) each."""

    m: Tensor
    grad: Tensor


@dataclass
class RowFactors:
    """`grad <- grad @ times - factor @ minus`, and the mixers' new gradient.

    Args:
        times: P of every a, then of every b, (2S, R, R)
        minus: Q of every a, then of every b, (2S, R, R), or None where it is zero
        grad_m: (S, R, R) or None
        condition: the largest condition number met, estimated from below by (max / min diagonal of Cholesky's L)^2
        num_fallbacks: matrices that Cholesky could not take, see `damped_inverse` (scalar tensor)
    """

    times: Tensor
    minus: Tensor | None
    grad_m: Tensor | None
    condition: Tensor
    num_fallbacks: Tensor


def row_factors(
    config: OptimConfig, gram_a: Tensor, gram_b: Tensor, cross: Tensor | None, mixers: Mixers | None
) -> RowFactors:
    """P and Q of every pair.

    Args:
        config: rule and damping
        gram_a, gram_b: a^T a and b^T b
        cross: a^T grad_a; wanted by `tangent` without mixers alone
        mixers: of the same pairs
    """
    tangent = config.preconditioner == "tangent"
    seen_by_a, seen_by_b = gram_b, gram_a
    if mixers is not None:
        seen_by_a = mixers.m @ gram_b @ mixers.m.mT
        seen_by_b = mixers.m.mT @ gram_a @ mixers.m
    to_invert = [seen_by_a, seen_by_b] if mixers is None else [seen_by_a, seen_by_b, gram_a, gram_b]
    inverses, condition, num_fallbacks = damped_inverse(torch.cat(to_invert), config)
    times_a, times_b, *own = inverses.chunk(len(to_invert))
    minus = grad_m = None
    if mixers is None:
        if tangent:
            assert cross is not None
            minus_a = 0.5 * times_b @ cross @ times_a  # [G_a] is what b's rows are multiplied with, and [G_b] a's
            minus = torch.cat((minus_a, minus_a.mT))
    else:
        inverse_a, inverse_b = own
        grad_m = inverse_a @ mixers.grad @ inverse_b
        if tangent:
            minus_a = inverse_a @ mixers.grad @ mixers.m.mT @ times_a
            minus_b = inverse_b @ mixers.grad.mT @ mixers.m @ times_b
            minus = torch.cat((minus_a, minus_b))
    return RowFactors(torch.cat((times_a, times_b)), minus, grad_m, condition, num_fallbacks)


# Where the damping adds a hundred roundings of fp32, as a share of the trace, Cholesky takes whatever is finite.
_CERTAIN_SHARE = 1e-5


def damped_inverse(gram: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`(G + d I)^-1` of symmetric positive semidefinite matrices, all at once.

    Cholesky fails where the damping leaves a matrix singular. Only with a damping so small that this may happen does
    the host ask whether it has, and an eigendecomposition gives the pseudo-inverse: directions without weight count as
    zero. With any other it takes all that is finite; should it fail all the same, the mean eigenvalue stands for all.

    Args:
        gram: (N, R, R)
        config: `damping` (times trace(G) / R) and `damping_abs`

    Returns:
        the inverses (N, R, R); the largest condition estimate; how many matrices Cholesky failed for (both scalar)
    """
    rank = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = config.damping * mean + config.damping_abs
    identity = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    damped = gram + damping[:, None, None] * identity
    cholesky, info = torch.linalg.cholesky_ex(damped)
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | ~(diagonal.amin(-1) > 0)
    estimate = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    condition = torch.where(failed, torch.zeros_like(estimate), estimate).amax()
    # (L L^T)^-1 = L^-T L^-1, symmetric to the last bit. One batched solve and one batched product: `cholesky_inverse`
    # of a batch is a loop of solver calls on some devices.
    of_mean = (mean + damping).sqrt()[:, None, None] * identity
    whole = torch.where(failed[:, None, None], of_mean, cholesky)
    root = torch.linalg.solve_triangular(whole, identity, upper=False)
    inverse = root.mT @ root
    num_failed = failed.sum()
    may_fail = config.damping < _CERTAIN_SHARE * rank or not config.damping_abs
    if may_fail and num_failed:  # read by the host, once for each process group of a step
        inverse[failed] = torch.linalg.pinv(damped[failed], hermitian=True)
    return inverse, condition, num_failed
