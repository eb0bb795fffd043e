"""What an adapted layer computes, as two autograd functions: down to the experts' features, and up from them.

    Projection    x (T, D)         -> features x a (T, F) and router logits x W^T (T, E), in one product
    RoutedExperts features, gates  -> base + s sum_e gate_e features_e m_e b_e^T (T, O)

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `R` rank, `F = E * R` (the rank dims of all
experts side by side). All experts take part for every token, unselected ones with gate 0, so shapes never depend on the
data. Saved for the backward pass are the parameters themselves, no copy and no view of them: under ZeRO-3 anything else
would keep the gathered weight alive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def routed_experts(
    base_TO: Tensor | None,
    x_TD: Tensor,
    gate_TE: Tensor,
    selected_TE: Tensor,
    a_EDR: Tensor,
    *outgoing_factors: Tensor | None,
    scale: float,
    gate_power: float = 1.0,
    forked: bool = False,
) -> Tensor:
    """(T, O): `base + s sum_e gate_e (x a_e) m_e b_e^T`, where the features have not been made yet.

    The arguments are those of `Projection` and `RoutedExperts`.
    """
    _, *features, _ = Projection.apply(x_TD, forked, a_EDR)
    mixed: Tensor = RoutedExperts.apply(base_TO, *features, gate_TE, selected_TE, *outgoing_factors, scale, gate_power)
    return mixed


def side_by_side(factor_EXR: Tensor) -> Tensor:
    """(E, X, R) -> (X, F): the experts' columns next to one another, for one dense product."""
    return _joined(factor_EXR.unbind(0))


def _per_expert(grad_FX: Tensor, num_experts: int) -> Tensor:
    """(F, X) -> (E, X, R): a gradient on its way back to the factor."""
    num_features, num_rows = grad_FX.shape
    return grad_FX.view(num_experts, num_features // num_experts, num_rows).transpose(1, 2).contiguous()


class Projection(torch.autograd.Function):
    """`x a` of all experts and `x W^T` of the router, both or one of them, and `x` itself for the base layer.

    Who takes `x` from here has this gradient added inside the product of the backward pass, where autograd would make
    another pass over a tensor of the size of `x`.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: Tensor, forked: bool, a_EDR: Tensor | None, *weights_ED: Tensor
    ) -> tuple[Tensor | None, ...]:
        """`x_TD`, features (T, F), the same again for `a`, logits (T, all E) fp32; None for what is not asked for.

        Args:
            x_TD: any dtype
            forked: two gradients of the features come back: through the first what `x` gets, through the second what
                `a` gets
            a_EDR: (E, D, R)
            weights_ED: whose logits are wanted, side by side; in fp32 (or wider, as `x`), see `product_fp32`
        """
        _, _, *is_trained = ctx.needs_input_grad  # type: ignore[attr-defined]
        ctx.dtype = x_TD.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(x_TD if any(is_trained) else None, a_EDR, *weights_ED)  # type: ignore[arg-type]  # takes None
        ctx.set_materialize_grads(False)
        features_TF, logits_TE = _down(x_TD, a_EDR, weights_ED)
        for_a_TF = features_TF.view_as(features_TF) if forked and features_TF is not None else None
        return x_TD.view_as(x_TD), features_TF, for_a_TF, logits_TE

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, `a` and weights in their dtypes, from the whole fp32 gradient of the logits."""
        x_TD, a_EDR, *weights_ED = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TD, grad_TF, for_a_TF, grad_TE = grads
        need_x, _, need_a, *need_weights = ctx.needs_input_grad  # type: ignore[attr-defined]
        parts = [] if grad_TE is None else _exact_parts(grad_TE, ctx.dtype)  # type: ignore[attr-defined]
        to_x, to_a = ([] if grad is None else [grad] for grad in (grad_TF, grad_TF if for_a_TF is None else for_a_TF))
        grad_x, grad_a, grad_weights = grad_TD, None, [None] * len(weights_ED)
        reads = [*to_x, *parts]
        columns_TP = _joined(reads) if reads else None
        if need_x and columns_TP is not None:
            rows_PD = _columns(a_EDR if to_x else None, weights_ED, len(parts)).t()
            grad_x = columns_TP @ rows_PD if grad_TD is None else torch.addmm(grad_TD, columns_TP, rows_PD)
        to_a, parts = to_a if need_a else [], parts if any(need_weights) else []
        learns = [*to_a, *parts]
        if learns:
            # `a` may have another gradient than `x`, and not all may be trained
            if columns_TP is None or [*map(id, learns)] != [*map(id, reads)]:
                columns_TP = _joined(learns)
            found_PD = columns_TP.t() @ x_TD
            num_features = to_a[0].shape[1] if to_a else 0
            if to_a:
                grad_a = _per_expert(found_PD[:num_features], a_EDR.shape[0])
            if parts:
                grad_ED = found_PD[num_features:]
                if len(parts) > 1:
                    grad_ED = grad_ED.unflatten(0, (len(parts), -1)).sum(0)
                pieces = grad_ED.split([weight.shape[0] for weight in weights_ED])
                grad_weights = [piece if need else None for piece, need in zip(pieces, need_weights, strict=True)]
        return grad_x, None, grad_a, *grad_weights


def _down(x_TD: Tensor, a_EDR: Tensor | None, weights_ED: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Features in the dtype of `x` and logits in fp32, of one product where the device lets it be."""
    if a_EDR is None:
        return None, product_fp32(x_TD, _columns(None, weights_ED))
    if not weights_ED:
        return x_TD @ side_by_side(a_EDR), None
    is_wide = x_TD.dtype.itemsize >= torch.float32.itemsize
    if not is_wide and (x_TD.dtype == torch.float16 or _leaves_rounding_out(x_TD.device, x_TD.dtype)):
        return x_TD @ side_by_side(a_EDR), product_fp32(x_TD, _columns(None, weights_ED))
    columns_DP = _columns(a_EDR, weights_ED)
    num_features = a_EDR.shape[0] * a_EDR.shape[2]
    both_TP = x_TD @ columns_DP
    features_TF, rounded_TE = both_TP[:, :num_features], both_TP[:, num_features:]
    if is_wide:
        return features_TF, rounded_TE
    return features_TF, _with_remainder(rounded_TE, x_TD, columns_DP[:, num_features:])


def _columns(a_EDR: Tensor | None, weights_ED: Sequence[Tensor], num_parts: int = 1) -> Tensor:
    """(D, P): what `x` meets on its way to features and logits, and their gradients on the way back, in one copy."""
    of_features = () if a_EDR is None else a_EDR.unbind(0)
    return _joined([*of_features, *num_parts * [weight_ED.t() for weight_ED in weights_ED]])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim=1)


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
    return _with_remainder(x_TD @ weight_DE, x_TD, weight_DE)


def _with_remainder(rounded_TE: Tensor, x_TD: Tensor, weight_DE: Tensor) -> Tensor:
    """`x W` in fp32 from its rounding, by the product that is left when that is taken away."""
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


def _exact_parts(grad_TE: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """An fp32 tensor in `dtype`: itself, or its rounding and the remainder; products with both lose nothing to it."""
    if grad_TE.dtype == dtype:
        return [grad_TE]
    rounded_TE = grad_TE.to(dtype)
    return [rounded_TE, (grad_TE - rounded_TE).to(dtype)]


class RoutedExperts(torch.autograd.Function):
    """`y = base + s * sum_e gate_e features_e m_e b_e^T`, with the gate's power of choice in the factors' gradients.

    The mixers `m_e` are those of MoSLoRA (Wu et al. 2024, arXiv 2406.11909); `diag(ratio_e) b_e` takes the place of
    `b_e` for DoRA (see `dora`).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        base_TO: Tensor | None,
        features_TF: Tensor,
        for_a_TF: Tensor | None,
        gate_TE: Tensor,
        selected_TE: Tensor,
        b_EOR: Tensor,
        m_ERR: Tensor | None,
        ratio_EO: Tensor | None,
        scale: float,
        gate_power: float,
    ) -> Tensor:
        """(T, O): `base_TO` plus the experts' output.

        Args:
            base_TO: output of the frozen layer; None stands for 0
            features_TF: `x a` of all experts
            for_a_TF: the same, through which `a` gets its gradient where that of `features_TF` is for `x` alone
            gate_TE: fp32, 0 where not selected
            selected_TE: bool, which experts a token uses
            b_EOR: (E, O, R)
            m_ERR: (E, R, R); None stands for identities
            ratio_EO: fp32, where there is no `m_ERR`; None stands for ones
            scale: s of the layer
            gate_power: the gate enters the gradients of `a`, `b`, `m` and the ratios as
                `where(selected, gate ** gate_power, 0)`; without `for_a_TF` those of `x` too, as in the code that
                Sun et al. released
        """
        mask_TE = None if gate_power == 1.0 else selected_TE  # otherwise the gates say it all
        ctx.save_for_backward(gate_TE, mask_TE, features_TF, b_EOR, m_ERR, ratio_EO)  # type: ignore[arg-type]
        ctx.scale, ctx.gate_power, ctx.is_forked = scale, gate_power, for_a_TF is not None  # type: ignore[attr-defined]
        out_OF = side_by_side(outgoing(b_EOR, m_ERR, ratio_EO))
        return _scaled_product(_weigh(features_TF, gate_TE), out_OF.t(), scale, base_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of base, features, gate and factors; exact for gate_power 1, and that of the gate always."""
        gate_TE, selected_TE, features_TF, b_EOR, m_ERR, ratio_EO = ctx.saved_tensors
        need_base, need_features, _, need_gate, _, *need_out = ctx.needs_input_grad
        grad_gate = grad_features = grad_for_a = grad_b = grad_m = grad_ratio = None

        grad_TF = _scaled_product(grad_TO, side_by_side(outgoing(b_EOR, m_ERR, ratio_EO)), ctx.scale)
        if need_gate:
            grad_gate = (grad_TF.float() * features_TF).unflatten(-1, (gate_TE.shape[-1], -1)).sum(-1)
        weight_TE = gate_TE
        if ctx.gate_power != 1.0:
            weight_TE = torch.where(selected_TE, gate_TE**ctx.gate_power, 0.0)
        if any(need_out):
            hidden_TF = _weigh(features_TF, weight_TE)
            grad_EOR = _per_expert(_scaled_product(hidden_TF.t(), grad_TO, ctx.scale), b_EOR.shape[0])
            grad_b, grad_m, grad_ratio = _outgoing_backward(grad_EOR, b_EOR, m_ERR, ratio_EO)
        if ctx.is_forked:
            grad_for_a = _weigh(grad_TF, weight_TE)
        if need_features:
            grad_features = _weigh(grad_TF, gate_TE if ctx.is_forked else weight_TE)
        of_inputs = (grad_TO if need_base else None, grad_features, grad_for_a, grad_gate, None)
        return *of_inputs, grad_b, grad_m, grad_ratio, None, None


def _weigh(features_TF: Tensor, weight_TE: Tensor) -> Tensor:
    """Each expert's features times its weight (fp32), rounded once to the dtype of the features."""
    features_TER = features_TF.unflatten(-1, (weight_TE.shape[-1], -1))
    return (features_TER * weight_TE.unsqueeze(-1)).to(features_TF.dtype).flatten(1)


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
