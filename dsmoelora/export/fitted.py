"""The best single LoRA adapter for the factors `a` of a mixture: `b` by least squares on what the mixture did.

A layer's features z = x [a_1 ... a_E] (T, F) become y = (g z) B0^T with gates g that depend on the token and
B0 = s [b_1 ... b_E] (O, F). One matrix B for all tokens comes nearest where

    sum_t || y_t - z_t B^T ||^2  is least:  B = C_yz C_zz^-1,  C_yz = B0 sum_t (g z)_t^T z_t,  C_zz = sum_t z_t^T z_t

so what has to be summed over tokens is F x F. A little is added to the diagonal, and the solution is taken as a change
of the average's B: directions that no token has shown stay as they are there, and on the tokens seen it is never worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.adapters.experts.products import side_by_side

_RIDGE = 1e-6  # of the mean of the diagonal


@dataclass
class Moments:
    """Sums over tokens of one layer, (F, F) fp64 each.

    Args:
        plain: of z^T z
        mixed: of (g z)^T z
        square: of (g z)^T (g z)
    """

    plain: Tensor
    mixed: Tensor
    square: Tensor

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Of no token yet."""
        return cls(*(torch.zeros(size, size, dtype=torch.float64) for _ in range(3)))

    def add(self, features_TF: Tensor, gate_TE: Tensor) -> None:
        """Take in some tokens."""
        mixed_TF = (features_TF.unflatten(1, (gate_TE.shape[1], -1)) * gate_TE.unsqueeze(-1)).flatten(1)
        self.plain += (features_TF.t() @ features_TF).cpu()
        self.mixed += (mixed_TF.t() @ features_TF).cpu()
        self.square += (mixed_TF.t() @ mixed_TF).cpu()

    def fitted(self, b_OF: Tensor, start_OF: Tensor) -> Tensor:
        """(O, F) fp64: the matrix that comes nearest to the mixture.

        Args:
            b_OF: `B0`, of the mixture
            start_OF: what stays where no token says otherwise, such as the average's
        """
        ridge = _RIDGE * self.plain.diagonal().mean()
        if ridge == 0:
            return start_OF
        lower = torch.linalg.cholesky(self.plain + ridge * torch.eye(len(self.plain), dtype=torch.float64))
        missing_OF = b_OF @ self.mixed - start_OF @ self.plain
        return start_OF + torch.cholesky_solve(missing_OF.t(), lower).t()

    def errors(self, b_OF: Tensor, found_OF: Tensor) -> tuple[float, float]:
        """Sums over tokens of `||y - z B^T||^2` and of `||y||^2`.

        Args:
            b_OF: `B0`, of the mixture
            found_OF: B
        """
        of_mixture = ((b_OF @ self.square) * b_OF).sum()
        both, own = ((b_OF @ self.mixed) * found_OF).sum(), ((found_OF @ self.plain) * found_OF).sum()
        return float(of_mixture - 2 * both + own), float(of_mixture)


@contextmanager
def measured_moments(model: nn.Module, wanted: bool = True) -> Iterator[dict[str, Moments]]:
    """The moments of each adapted layer over all tokens that the model sees inside the block, where they are wanted."""
    found: dict[str, Moments] = {}

    def watch(name: str) -> Any:
        def add(experts: Any, inputs: tuple[Any, ...]) -> None:
            x_TD, gate_TE = inputs[1].detach(), inputs[2].detach().double()
            features_TF = x_TD.double() @ side_by_side(experts.a.detach().double())
            found.setdefault(name, Moments.empty(features_TF.shape[1])).add(features_TF, gate_TE)

        return add

    layers = adapted_layers(model) if wanted else ()
    handles = [layer.experts.register_forward_pre_hook(watch(name)) for name, layer in layers]
    with adapter_context(model).hooks(handles):
        yield found
