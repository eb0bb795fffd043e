"""DoRA for routed experts: what an expert does to the length of each row of the weight is a trained number of its own.

    y = y0 (1 + sum_e g_e (ratio_e - 1)) + s sum_e g_e (x a_e) (diag(ratio_e) b_e)^T + bias      ratio_e = mag_e / n_e

with `y0 = x W0^T`, `mag_e` (O,) trained from the row norms of W0 on, and `n_e` the row norms of `W0 + s b_e a_e^T`, a
constant in the backward pass: Liu et al. 2024 (arXiv 2402.09353, section 4.3), an expert at a time. At gate 1 the row o
of an expert's weight has length `mag_e[o]`.

No weight is ever made for an expert. With the columns of all `a_e`, F = E R of them, as further tokens of the base,

    n_e^2 = |W0_o|^2 + 2 s (b_e (W0 a_e)^T)_oo + s^2 (b_e a_e^T a_e b_e^T)_oo

Shapes as in `function`; L are the experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.function import powered
from dsmoelora.adapters.experts.products import product_fp32, side_by_side
from dsmoelora.adapters.precision import of_base, typed
from dsmoelora.adapters.targets.linear import Linear

# Opens weights for reading: inside the block they are whole.
Gathered = Callable[[Iterable[Any]], AbstractContextManager[None]]


class RescaledRows(torch.autograd.Function):
    """`base + (base - bias) sum_e gate_e (ratio_e - 1)`, with the gate's power of choice in the ratios' gradient.

    Where all ratios are 1 it is `base` to the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        bias_O: Tensor | None,
        gate_TE: Tensor,
        ratio_EO: Tensor,
        gate_power: float,
    ) -> Tensor:
        """(T, O); `bias_O` (None for 0) is not rescaled. For the other arguments see `RoutedExperts`."""
        ctx.save_for_backward(base_TO, bias_O, gate_TE, ratio_EO)
        ctx.gate_power = gate_power
        return torch.addcmul(base_TO, _without(base_TO, bias_O), _change(base_TO, gate_TE, ratio_EO))

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of base, gate and ratios; those of base and gate are exact for every power."""
        base_TO, bias_O, gate_TE, ratio_EO = ctx.saved_tensors
        need_base, _, need_gate, need_ratio, _ = ctx.needs_input_grad
        grad_base = grad_gate = grad_ratio = None
        if need_base:
            grad_base = torch.addcmul(grad_TO, grad_TO, _change(base_TO, gate_TE, ratio_EO))
        product_TO = grad_TO * _without(base_TO, bias_O)
        if need_gate:
            grad_gate = product_fp32(product_TO, (ratio_EO - 1).to(product_TO.dtype).t())
        if need_ratio:
            weight_TE = powered(gate_TE, ctx.gate_power)
            grad_ratio = (weight_TE.to(product_TO.dtype).t() @ product_TO).to(ratio_EO.dtype)
        return grad_base, None, grad_gate, grad_ratio, None


def _without(base_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    return base_TO if bias_O is None else base_TO - bias_O


def _change(base_TO: Tensor, gate_TE: Tensor, ratio_EO: Tensor) -> Tensor:
    """(T, O): `sum_e gate_e (ratio_e - 1)` in the dtype of the activations; small numbers lose little by it."""
    return gate_TE.to(base_TO.dtype) @ (ratio_EO - 1).to(base_TO.dtype)


@dataclass(frozen=True)
class _Norms:
    """What follows from the weights alone: norms (L, O), the bias (O,) if there is one; and what weights these were."""

    norm_LO: Tensor
    bias_O: Tensor | None
    versions: tuple[Hashable, ...]


class DoraRows(nn.Module):
    """The base layer of experts of kind `dora`, its rows rescaled, and the ratios that go with it.

    A module with the same parameters as the experts' own, for ZeRO-3 gathers what the module that is called has. In
    evaluation mode norms are computed once: answers come token by token, and E R columns are many beside one token.

    Args:
        a: (L, D, R)
        b: (L, O, R)
        magnitude: (L, O), the trained lengths; filled by `start_magnitudes`
        scale: s
        gate_power: of the gate in the gradient of the magnitudes
    """

    def __init__(
        self, a: nn.Parameter, b: nn.Parameter, magnitude: nn.Parameter, scale: float, gate_power: float
    ) -> None:
        super().__init__()
        self.a, self.b, self.magnitude = a, b, magnitude
        self._scale, self._gate_power = scale, gate_power
        self._kept: _Norms | None = None
        self.base_norm_O: Tensor
        self.register_buffer("base_norm_O", torch.ones_like(magnitude[0], requires_grad=False), persistent=False)

    def forward(
        self,
        base: Linear,
        x_TD: Tensor,
        gate_TE: Tensor,
        of_all_experts: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What the base layer says with its rows rescaled (T, O), and the ratios (L, O), fp32, of this rank's experts.

        Args:
            base: the frozen layer; called for the norms too, so that ZeRO-3 gathers its weight
            x_TD: tokens, without dropout
            gate_TE: fp32, for the experts of all ranks
            of_all_experts: makes (E, O) of this rank's (L, O)
        """
        norms = self._kept_norms(base)
        ratio_LO = self.magnitude.to(norms.norm_LO.dtype) / norms.norm_LO
        ratio_EO = of_all_experts(ratio_LO)
        base_TO, bias_O = of_base(base, x_TD), typed(norms.bias_O, x_TD)
        base_TO = RescaledRows.apply(base_TO, bias_O, gate_TE, ratio_EO, self._gate_power)
        return base_TO, ratio_LO

    def train(self, mode: bool = True) -> DoraRows:
        """Another mode; what was kept is forgotten."""
        self._kept = None
        super().train(mode)
        return self

    def _kept_norms(self, base: Linear) -> _Norms:
        weights = (self.a, self.b, base.weight)  # in-place writes count their versions up
        versions = tuple((weight._version, weight.device, weight.dtype) for weight in weights)
        kept = self._kept
        if kept is not None and kept.versions == versions:
            return kept
        norms = _Norms(*self._norms(base), versions)
        # others could not be used any more when gradients are wanted
        self._kept = None if self.training or norms.norm_LO.is_inference() else norms
        return norms

    @torch.no_grad()
    def _norms(self, base: Linear) -> tuple[Tensor, Tensor | None]:
        """`n_e` (L, O), rounded to the dtype of the magnitudes, whose start is rounded too; and the bias, if any.

        Where `b` is 0 it is `base_norm_O` to the last bit, so that the ratios of the start are 1.
        """
        num_experts, _, rank = self.a.shape
        columns_FD = typed(side_by_side(self.a).t(), base.weight)
        if base.bias is None:
            w_a_FO, bias_O = base(columns_FD), None
        else:  # ZeRO-3 keeps the bias in pieces; the layer says it where its input is 0
            w_a_FO = base(torch.cat((columns_FD, torch.zeros_like(columns_FD[:1]))))
            bias_O = w_a_FO[-1]
            w_a_FO = w_a_FO[:-1] - bias_O
        wide = torch.promote_types(self.b.dtype, torch.float32)
        w_a_LOR = w_a_FO.view(num_experts, rank, -1).transpose(1, 2)
        a_LDR, b_LOR = self.a.to(wide), self.b.to(wide)
        along_LOR = 2 * w_a_LOR + self._scale * torch.bmm(b_LOR, torch.bmm(a_LDR.mT, a_LDR))
        change_LO = self._scale * (along_LOR * b_LOR).sum(-1)
        base_norm_O = self.base_norm_O.to(wide)
        norm_LO = (base_norm_O.square() + change_LO).clamp(min=0).sqrt()
        norm_LO = torch.where(change_LO == 0, base_norm_O, norm_LO).to(self.magnitude.dtype)
        return norm_LO.clamp(min=torch.finfo(norm_LO.dtype).tiny).to(wide), bias_O  # a row of zeros stays one


@torch.no_grad()
def start_magnitudes(banks: Iterable[tuple[Linear, DoraRows]], gathered: Gathered = lambda _: nullcontext()) -> None:
    """Set magnitudes to the row norms of their base weights, one layer after the other.

    Args:
        banks: base layers, and the rows that belong to them
        gathered: makes a base weight whole for the time of a block
    """
    for base, rows in banks:
        with gathered([base.weight]):
            weight_OD = base.weight if isinstance(base, nn.Linear) else base.weight.t()
            norm_O = torch.linalg.vector_norm(
                weight_OD, dim=1, dtype=torch.promote_types(weight_OD.dtype, torch.float32)
            )
        rows.base_norm_O.copy_(norm_O)
        rows.magnitude.copy_(norm_O.expand_as(rows.magnitude))
