"""What an adapted layer adds to its base, as one autograd function.

    features = x a (T, F)    logits = x W^T (T, E)    gate = the router's rule of the logits
    y = base + s sum_e gate_e features_e m_e b_e^T (T, O)

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `R` rank, `F = E * R` (the rank dims of all
experts side by side). All experts take part for every token, unselected ones with gate 0, so shapes never depend on the
data. Saved for the backward pass are the parameters themselves, no copy and no view of them: under ZeRO-3 anything else
would keep the gathered weight alive. Where the router decides here, of the features only their products with the gates
are saved (`hidden`): `b` learns from these, and with their gradient they give that of the gates times the gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.products import (
    columns,
    exact_parts,
    features_and_logits,
    num_parts,
    per_expert,
    product_fp32,
    scaled_product,
    side_by_side,
    sum_of_parts,
)

if TYPE_CHECKING:
    from dsmoelora.adapters.routers.linear import LinearRouter


@dataclass(frozen=True)
class Mixture:
    """How a layer mixes its experts, the same in every call.

    Args:
        scale: s
        gate_power: the gate enters the gradients of `a`, `b`, `m` and the ratios as
            `gate ** gate_power`, or 0 where it is 0: see `powered`
        power_for_input: those of `x` too, as in the code that Sun et al. released
        num_shared: experts behind the routed ones, whose gate is 1
    """

    scale: float
    gate_power: float = 1.0
    power_for_input: bool = False
    num_shared: int = 0


class RoutedExperts(torch.autograd.Function):
    """`y = base + s * sum_e gate_e (x a_e) m_e b_e^T`, with the gate's power of choice in the factors' gradients.

    Gates come from a router that reads the same `x`, whose logits are then columns of the same products, or are given.
    The mixers `m_e` are those of MoSLoRA (Wu et al. 2024, arXiv 2406.11909); `diag(ratio_e) b_e` takes the place of
    `b_e` for DoRA (see `dora`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixture: Mixture,
        router: LinearRouter | None,
        base_TO: Tensor | None,
        x_TD: Tensor,
        gate_TE: Tensor | None,
        weight_ED: Tensor | None,
        a_EDR: Tensor,
        b_EOR: Tensor,
        m_ERR: Tensor | None,
        ratio_EO: Tensor | None,
    ) -> Tensor:
        """(T, O): `base_TO` plus the experts' output.

        Args:
            mixture: of the layer
            router: makes gates of the logits; None where they are given, or all 1
            base_TO: output of the frozen layer; None stands for 0
            x_TD: any dtype
            gate_TE: given, fp32, 0 where an expert is not selected; None stands for ones where there is no router
            weight_ED: of the router
            a_EDR: (E, D, R)
            b_EOR: (E, O, R)
            m_ERR: (E, R, R); None stands for identities
            ratio_EO: fp32, where there is no `m_ERR`; None stands for ones
        """
        features_TF, logits_TE = features_and_logits(x_TD, a_EDR, weight_ED)
        losses = None
        if router is not None:
            assert logits_TE is not None, "they are made with the weight"
            gate_TE, losses = router.decide(logits_TE)
            gate_TE = with_shared(gate_TE, mixture.num_shared)
            # a copy where they are columns beside the features, which need not be kept
            logits_TE = logits_TE.contiguous() if losses is not None or router.rule.looks_back else None
        hidden_TF = _weigh(features_TF, gate_TE)
        ctx.mixture, ctx.router, ctx.losses = mixture, router, losses
        learns = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]  # the router's weight or `a`, from x
        ctx.keeps_hidden = router is not None and mixture.gate_power == 1.0
        made = (x_TD if learns else None, gate_TE, hidden_TF if ctx.keeps_hidden else features_TF, logits_TE)
        ctx.save_for_backward(*made, weight_ED, a_EDR, b_EOR, m_ERR, ratio_EO)
        out_OF = side_by_side(outgoing(b_EOR, m_ERR, ratio_EO))
        return scaled_product(hidden_TF, out_OF.t(), mixture.scale, base_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Of what `forward` takes; exact for gate_power 1, and that of gates and router always."""
        x_TD, gate_TE, kept_TF, logits_TE, weight_ED, a_EDR, b_EOR, m_ERR, ratio_EO = ctx.saved_tensors
        _, _, need_base, need_x, need_gate, need_weight, need_a, *need_out = ctx.needs_input_grad
        mixture: Mixture = ctx.mixture
        power_TE = None if gate_TE is None else powered(gate_TE, mixture.gate_power)

        grad_TF = scaled_product(grad_TO, side_by_side(outgoing(b_EOR, m_ERR, ratio_EO)), mixture.scale)
        grad_b = grad_m = grad_ratio = None
        if any(need_out):
            learned_TF = kept_TF if ctx.keeps_hidden else _weigh(kept_TF, power_TE)
            grad_EOR = per_expert(scaled_product(learned_TF.t(), grad_TO, mixture.scale), b_EOR.shape[0])
            grad_b, grad_m, grad_ratio = _outgoing_backward(grad_EOR, b_EOR, m_ERR, ratio_EO)

        grad_gate = grad_logits = None
        if need_gate or (weight_ED is not None and (need_x or need_weight)):
            grad_gate = _of_experts(_wide(grad_TF) * kept_TF, gate_TE).sum(-1)
            if weight_ED is not None:
                weighed_TE = grad_gate if ctx.keeps_hidden else grad_gate * gate_TE
                grad_logits = _through_the_router(ctx, weighed_TE, gate_TE, logits_TE)

        columns_TP = grad_x = grad_a = grad_weight = None
        if need_x:
            columns_TP = _beside(grad_TF, power_TE if mixture.power_for_input else gate_TE, grad_logits)
            weights = [] if weight_ED is None else [weight_ED]
            grad_x = columns_TP @ columns(a_EDR, weights, num_parts(grad_logits, grad_TF.dtype)).t()
        if need_a or need_weight:
            if columns_TP is None or (power_TE is not gate_TE and not mixture.power_for_input):
                columns_TP = _beside(grad_TF, power_TE, grad_logits)
            num_features = grad_TF.shape[1]
            trained = slice(None if need_a else num_features, None if need_weight else num_features)
            found_PD = columns_TP[:, trained].t() @ x_TD
            of_a_FD, of_weight_PD = found_PD.tensor_split([num_features if need_a else 0])
            grad_a = per_expert(of_a_FD, a_EDR.shape[0]) if need_a else None
            grad_weight = sum_of_parts(of_weight_PD, num_parts(grad_logits, grad_TF.dtype)) if need_weight else None
        of_inputs = (grad_TO if need_base else None, grad_x, grad_gate if need_gate else None)
        return None, None, *of_inputs, grad_weight, grad_a, grad_b, grad_m, grad_ratio


class RouterLogits(torch.autograd.Function):
    """`x W^T` in fp32 (or wider, as `x`), see `product_fp32`, for a router that stands by itself."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *weights_ED: Tensor) -> Tensor:
        """(T, all E), the logits of all weights side by side."""
        ctx.dtype = x_TD.dtype
        ctx.save_for_backward(x_TD if any(ctx.needs_input_grad[1:]) else None, *weights_ED)
        return product_fp32(x_TD, columns(None, weights_ED))

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and weights in their dtypes, from the whole fp32 gradient."""
        x_TD, *weights_ED = ctx.saved_tensors
        need_x, *need_weights = ctx.needs_input_grad
        columns_TP, parts = exact_parts(grad_TE, ctx.dtype), num_parts(grad_TE, ctx.dtype)
        grad_x = columns_TP @ columns(None, weights_ED, parts).t() if need_x else None
        if not any(need_weights):
            return grad_x, *(None for _ in weights_ED)
        grad_ED = sum_of_parts(columns_TP.t() @ x_TD, parts)
        pieces = grad_ED.split([len(weight) for weight in weights_ED])
        return grad_x, *(piece if need else None for piece, need in zip(pieces, need_weights, strict=True))


def _through_the_router(ctx: Any, weighed_TE: Tensor, gate_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
    """(T, E) fp32, of the logits from that of the gates times the gates, with the router's losses."""
    if ctx.mixture.num_shared:  # whose gates are no router's
        weighed_TE, gate_TE = (one[:, : -ctx.mixture.num_shared] for one in (weighed_TE, gate_TE))
    grad_TE: Tensor = ctx.router.rule.gradient_from_weighed(weighed_TE, gate_TE, logits_TE)
    return grad_TE if ctx.losses is None else ctx.losses.add_to(grad_TE, logits_TE)


def with_shared(gate_TE: Tensor, num_shared: int) -> Tensor:
    """Gates with those of the shared experts behind them, which no router knows of."""
    return nn.functional.pad(gate_TE, (0, num_shared), value=1) if num_shared else gate_TE


def powered(gate_TE: Tensor, power: float) -> Tensor:
    """What enters the factors' gradients instead of the gate: its power with its sign, 0 for an expert not selected."""
    return gate_TE if power == 1.0 else gate_TE.sign() * gate_TE.abs() ** power


def _wide(tensor: Tensor) -> Tensor:
    """In fp32, or as it is where that is wider."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()


def _weigh(features_TF: Tensor, weight_TE: Tensor | None, out_TF: Tensor | None = None) -> Tensor:
    """Each expert's features times its weight (fp32), rounded once to the dtype of the features; None stands for 1."""
    if weight_TE is None:
        return features_TF
    out_TF = torch.empty_like(features_TF) if out_TF is None else out_TF
    torch.mul(_of_experts(features_TF, weight_TE), weight_TE.unsqueeze(-1), out=_of_experts(out_TF, weight_TE))
    return out_TF


def _beside(grad_TF: Tensor, weight_TE: Tensor | None, grad_logits: Tensor | None) -> Tensor:
    """(T, P): the weighed gradient of the features and, in the next columns, the exact parts of the logits', if any."""
    if grad_logits is None:
        return _weigh(grad_TF, weight_TE)
    (num_tokens, num_features), num_experts = grad_TF.shape, grad_logits.shape[1]
    num_columns = num_features + num_parts(grad_logits, grad_TF.dtype) * num_experts
    out_TP = grad_TF.new_empty(num_tokens, num_columns)
    _weigh(grad_TF, weight_TE, out_TP[:, :num_features])
    exact_parts(grad_logits, grad_TF.dtype, out_TP[:, num_features:])
    return out_TP


def _of_experts(features_TF: Tensor, gate_TE: Tensor) -> Tensor:
    """(T, E, R), a view."""
    num_tokens, num_experts = gate_TE.shape
    return features_TF.view(num_tokens, num_experts, features_TF.shape[1] // num_experts)


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
