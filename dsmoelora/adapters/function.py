"""The routed experts of one layer as two dense products: the autograd function of the project.

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `R` rank, `F = E * R` (the rank dims of all
experts side by side).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def side_by_side(factor_EXR: Tensor) -> Tensor:
    """(E, X, R) -> (X, F): the experts' columns next to one another, for one dense product."""
    num_experts, num_rows, rank = factor_EXR.shape
    return factor_EXR.permute(1, 0, 2).reshape(num_rows, num_experts * rank)


def _per_expert(grad_FX: Tensor, num_experts: int) -> Tensor:
    """(F, X) -> (E, X, R): a gradient on its way back to the factor."""
    num_features, num_rows = grad_FX.shape
    return grad_FX.view(num_experts, num_features // num_experts, num_rows).transpose(1, 2).contiguous()


def _weigh(features_TF: Tensor, weight_TE: Tensor) -> Tensor:
    """Each expert's features times its weight (fp32), rounded once to the dtype of the features."""
    features_TER = features_TF.unflatten(-1, (weight_TE.shape[-1], -1))
    return (features_TER * weight_TE.unsqueeze(-1)).to(features_TF.dtype).view_as(features_TF)


def _scaled_product(left: Tensor, right: Tensor, scale: float, plus: Tensor | None = None) -> Tensor:
    """`plus + scale * left @ right` in one kernel, the scale inside its fp32 sums; None stands for 0."""
    if plus is None:
        return torch.addmm(left.new_empty(()), left, right, beta=0.0, alpha=scale)
    return torch.addmm(plus, left, right, alpha=scale)


def outgoing(b_EOR: Tensor, m_ERR: Tensor | None, ratio_EO: Tensor | None = None) -> Tensor:
    """(E, O, R): what the features `x a_e` of an expert meet: `b_e m_e^T`, or `diag(ratio_e) b_e`, or `b_e` itself.

    To mix `b` costs `2 E O R^2` FLOPs, the features instead `2 T E R^2` and two more passes over (T, F).
    """
    if m_ERR is not None:
        return torch.bmm(b_EOR, m_ERR.mT)
    return b_EOR if ratio_EO is None else (b_EOR * ratio_EO.unsqueeze(-1)).to(b_EOR.dtype)


def _outgoing_backward(
    grad_EOR: Tensor, b_EOR: Tensor, m_ERR: Tensor | None, ratio_EO: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of b, m and ratio from that of `outgoing`."""
    if m_ERR is not None:
        return torch.bmm(grad_EOR, m_ERR), torch.bmm(grad_EOR.mT, b_EOR), None
    if ratio_EO is not None:
        return outgoing(grad_EOR, None, ratio_EO), None, (grad_EOR.to(ratio_EO.dtype) * b_EOR).sum(-1)
    return grad_EOR, None, None


class RoutedExperts(torch.autograd.Function):
    """`y = base + s * sum_e gate_e (x a_e) m_e b_e^T`, with the gate's power of choice in the factors' gradients.

    The mixers `m_e` are those of MoSLoRA (Wu et al. 2024, arXiv 2406.11909); `diag(ratio_e) b_e` takes the place of
    `b_e` for DoRA (see `dora`). All experts take part for every token,
    unselected ones with gate 0, so the shapes never depend on the data. Saved for the backward pass are the parameters
    themselves, no copy and no view of them: under ZeRO-3 anything else would keep the gathered weight alive.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        base_TO: Tensor | None,
        x_TD: Tensor,
        gate_TE: Tensor,
        selected_TE: Tensor,
        a_EDR: Tensor,
        b_EOR: Tensor,
        m_ERR: Tensor | None,
        ratio_EO: Tensor | None,
        scale: float,
        gate_power: float,
        power_reaches_input: bool,
    ) -> Tensor:
        """(T, O): `base_TO` plus the experts' output.

        Args:
            base_TO: output of the frozen layer; None stands for 0
            x_TD: input of the experts
            gate_TE: fp32, 0 where not selected
            selected_TE: bool, which experts a token uses
            a_EDR: (E, D, R)
            b_EOR: (E, O, R)
            m_ERR: (E, R, R); None stands for identities
            ratio_EO: fp32, where there is no `m_ERR`; None stands for ones
            scale: s of the layer
            gate_power: the gate enters the gradients of `a`, `b`, `m` and the ratios as
                `where(selected, gate ** gate_power, 0)`
            power_reaches_input: send the gradient with that power down to `x` too (Sun et al.'s released code)
        """
        features_TF = x_TD @ side_by_side(a_EDR)
        hidden_TF = _weigh(features_TF, gate_TE)
        factors = (a_EDR, b_EOR, m_ERR, ratio_EO)
        ctx.save_for_backward(x_TD, gate_TE, selected_TE, features_TF, *factors)  # type: ignore[arg-type]  # takes None
        ctx.scale, ctx.gate_power, ctx.power_reaches_input = scale, gate_power, power_reaches_input  # type: ignore[attr-defined]
        out_OF = side_by_side(outgoing(b_EOR, m_ERR, ratio_EO))
        return _scaled_product(hidden_TF, out_OF.t(), scale, base_TO)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of base, x, gate and factors; exact for gate_power 1, and for x and gate always by default."""
        x_TD, gate_TE, selected_TE, features_TF, a_EDR, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        b_EOR, m_ERR, ratio_EO = rest
        scale, gate_power = ctx.scale, ctx.gate_power  # type: ignore[attr-defined]
        need_base, need_x, need_gate, _, need_a, *need_out = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = grad_gate = grad_a = grad_b = grad_m = grad_ratio = None

        grad_TF = _scaled_product(grad_TO, side_by_side(outgoing(b_EOR, m_ERR, ratio_EO)), scale)
        if need_gate:
            grad_gate = (grad_TF.float() * features_TF).unflatten(-1, (gate_TE.shape[-1], -1)).sum(-1)

        weight_TE = gate_TE
        if gate_power != 1.0:
            weight_TE = torch.where(selected_TE, gate_TE**gate_power, 0.0)
        weighted_TF = _weigh(grad_TF, weight_TE)
        if need_a:
            grad_a = _per_expert(weighted_TF.t() @ x_TD, a_EDR.shape[0])
        if any(need_out):
            hidden_TF = _weigh(features_TF, weight_TE)
            grad_EOR = _per_expert(_scaled_product(hidden_TF.t(), grad_TO, scale), b_EOR.shape[0])
            grad_b, grad_m, grad_ratio = _outgoing_backward(grad_EOR, b_EOR, m_ERR, ratio_EO)
        if need_x:
            if gate_power != 1.0 and not ctx.power_reaches_input:  # type: ignore[attr-defined]
                weighted_TF = _weigh(grad_TF, gate_TE)
            grad_x = weighted_TF @ side_by_side(a_EDR).t()
        of_inputs = (grad_TO if need_base else None, grad_x, grad_gate, None)
        return *of_inputs, grad_a, grad_b, grad_m, grad_ratio, None, None, None


def product_fp32(x_TD: Tensor, weight_DE: Tensor) -> Tensor:
    """`x W` with an fp32 result (or wider, as `x`) and without an fp32 copy of `x`, dearer than the product itself.

    Low-precision products accumulate in fp32 and round once at the end. Where the device cannot leave that rounding
    out, a second product returns what the first one rounded away: 16 bits of mantissa in all for bf16.
    """
    if x_TD.dtype.itemsize >= torch.float32.itemsize:
        return x_TD @ weight_DE
    if _leaves_rounding_out(x_TD.device, x_TD.dtype):
        return torch.mm(x_TD, weight_DE, out_dtype=torch.float32)
    if x_TD.dtype == torch.float16:  # above 65,504 the first product is infinite, and its remainder no number
        return x_TD.float() @ weight_DE.float()
    rounded_TE = x_TD @ weight_DE
    remainder_TE = torch.addmm(rounded_TE, x_TD, weight_DE, beta=-1)
    return rounded_TE.float() + remainder_TE


@functools.cache
def _leaves_rounding_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has, on this device, products of `dtype` with an fp32 result; asked once by trying."""
    x_11 = torch.ones(1, 1, device=device, dtype=dtype)
    try:
        return torch.mm(x_11, x_11, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # TypeError: this torch does not know the argument
        return False


def _exact_parts(grad_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 (T, E) as (T, P * E) in `dtype`: itself, or its rounding and the remainder side by side (P = 2).

    A product with it loses nothing to the dtype.
    """
    if grad_TE.dtype == dtype:
        return grad_TE
    rounded_TE = grad_TE.to(dtype)
    return torch.cat((rounded_TE, (grad_TE - rounded_TE).to(dtype)), dim=-1)


class RouterLogits(torch.autograd.Function):
    """`logits = x W^T` in fp32 for inputs of any dtype, and `x` itself for those who use it next to the router.

    Who takes `x` from here has the router's share of its gradient added inside the router's own product, where
    autograd would make another pass over a tensor of the size of `x`.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, *weights_ED: Tensor) -> tuple[Tensor, Tensor]:
        """`x_TD`, and the logits (T, F) fp32 of all weights side by side; see `product_fp32` for how."""
        ctx.save_for_backward(x_TD, *weights_ED)
        return x_TD.view_as(x_TD), product_fp32(x_TD, _below_one_another(weights_ED).t())

    @staticmethod
    def backward(ctx: FunctionCtx, grad_TD: Tensor, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights in their dtypes, from the whole fp32 gradient of the logits."""
        x_TD, *weights_ED = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, *need_weights = ctx.needs_input_grad  # type: ignore[attr-defined]
        weight_FD = _below_one_another(weights_ED)
        parts_TP = _exact_parts(grad_TF, x_TD.dtype)
        num_parts = parts_TP.shape[-1] // weight_FD.shape[0]
        weight_PD = weight_FD if num_parts == 1 else weight_FD.repeat(num_parts, 1)
        grad_x = torch.addmm(grad_TD, parts_TP, weight_PD) if need_x else None
        if not any(need_weights):
            return grad_x, *(None for _ in weights_ED)
        grad_FD = parts_TP.t() @ x_TD
        if num_parts > 1:
            grad_FD = grad_FD.view(num_parts, *weight_FD.shape).sum(0)
        grads = grad_FD.split([weight.shape[0] for weight in weights_ED])
        return grad_x, *(grad if needed else None for grad, needed in zip(grads, need_weights, strict=True))


def _below_one_another(weights_ED: Sequence[Tensor]) -> Tensor:
    return weights_ED[0] if len(weights_ED) == 1 else torch.cat(tuple(weights_ED))
