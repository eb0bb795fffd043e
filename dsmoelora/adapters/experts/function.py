"""What an adapted layer adds to its base, as one autograd function.

    features = x a (T, F)    logits = x W^T (T, E)    gate = the router's rule of the logits
    y = base + s sum_e gate_e features_e m_e b_e^T (T, O)

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `R` rank, `F = E * R` (the rank dims of all
experts side by side). All experts take part for every token, unselected ones with gate 0, so shapes never depend on the
data. Saved for the backward pass are the parameters themselves, no copy and no view of them: under ZeRO-3 anything else
would keep the gathered weight alive.
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
    joined,
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
            if losses is None and not router.rule.looks_back:
                logits_TE = None
        ctx.mixture, ctx.router, ctx.losses = mixture, router, losses
        learns = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]  # the router's weight or `a`, from x
        made = (x_TD if learns else None, gate_TE, features_TF, logits_TE)
        ctx.save_for_backward(*made, weight_ED, a_EDR, b_EOR, m_ERR, ratio_EO)
        out_OF = side_by_side(outgoing(b_EOR, m_ERR, ratio_EO))
        return scaled_product(_weigh(features_TF, gate_TE), out_OF.t(), mixture.scale, base_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Of what `forward` takes; exact for gate_power 1, and that of gates and router always."""
        x_TD, gate_TE, features_TF, logits_TE, weight_ED, a_EDR, b_EOR, m_ERR, ratio_EO = ctx.saved_tensors
        _, _, need_base, need_x, need_gate, need_weight, need_a, *need_out = ctx.needs_input_grad
        mixture: Mixture = ctx.mixture
        weights = () if weight_ED is None else (weight_ED,)

        grad_TF = scaled_product(grad_TO, side_by_side(outgoing(b_EOR, m_ERR, ratio_EO)), mixture.scale)
        weight_TE = None if gate_TE is None else powered(gate_TE, mixture.gate_power)
        grad_b = grad_m = grad_ratio = None
        if any(need_out):
            hidden_TF = _weigh(features_TF, weight_TE)
            grad_EOR = per_expert(scaled_product(hidden_TF.t(), grad_TO, mixture.scale), b_EOR.shape[0])
            grad_b, grad_m, grad_ratio = _outgoing_backward(grad_EOR, b_EOR, m_ERR, ratio_EO)

        grad_gate: Tensor | None = None
        to_logits: list[Tensor] = []
        if gate_TE is not None and (need_gate or (weights and (need_x or need_weight))):
            grad_gate = _of_experts(_wide(grad_TF) * features_TF, gate_TE).sum(-1)
            if weights:
                to_logits = exact_parts(_through_the_router(ctx, grad_gate, gate_TE, logits_TE), features_TF.dtype)

        to_a_TF = to_x_TF = _weigh(grad_TF, weight_TE)
        if weight_TE is not gate_TE and not mixture.power_for_input and need_x:
            to_x_TF = _weigh(grad_TF, gate_TE)
        read = [to_x_TF, *to_logits]
        learn = [*([to_a_TF] if need_a else ()), *(to_logits if need_weight else ())]
        columns_TP = joined(read)
        grad_x = columns_TP @ columns(a_EDR, weights, len(to_logits)).t() if need_x else None
        grad_a = grad_weight = None
        if learn:
            # `a` may have another gradient than `x`, and not all may be trained
            if [*map(id, learn)] != [*map(id, read)]:
                columns_TP = joined(learn)
            found_PD = columns_TP.t() @ x_TD
            num_features = features_TF.shape[1] if need_a else 0
            grad_a = per_expert(found_PD[:num_features], a_EDR.shape[0]) if need_a else None
            grad_weight = sum_of_parts(found_PD[num_features:], len(to_logits)) if need_weight else None
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
        parts = exact_parts(grad_TE, ctx.dtype)
        columns_TP = joined(parts)
        grad_x = columns_TP @ columns(None, weights_ED, len(parts)).t() if need_x else None
        if not any(need_weights):
            return grad_x, *(None for _ in weights_ED)
        grad_ED = sum_of_parts(columns_TP.t() @ x_TD, len(parts))
        pieces = grad_ED.split([len(weight) for weight in weights_ED])
        return grad_x, *(piece if need else None for piece, need in zip(pieces, need_weights, strict=True))


def _through_the_router(ctx: Any, grad_gate: Tensor, gate_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
    """(T, E) fp32, of the logits from that of the gates, with the router's losses."""
    if ctx.mixture.num_shared:  # whose gates are no router's
        grad_gate, gate_TE = (one[:, : -ctx.mixture.num_shared] for one in (grad_gate, gate_TE))
    grad_TE: Tensor = ctx.router.rule.gradient(grad_gate, gate_TE, logits_TE)
    return grad_TE if ctx.losses is None else ctx.losses.add_to(grad_TE, logits_TE)


def with_shared(gate_TE: Tensor, num_shared: int) -> Tensor:
    """Gates with those of the shared experts behind them, which no router knows of."""
    return nn.functional.pad(gate_TE, (0, num_shared), value=1) if num_shared else gate_TE


def powered(gate_TE: Tensor, power: float) -> Tensor:
    """What enters the factors' gradients instead of the gate: its power, and 0 for an expert that is not selected."""
    return gate_TE if power == 1.0 else torch.where(gate_TE != 0, gate_TE**power, 0.0)


def _wide(tensor: Tensor) -> Tensor:
    """In fp32, or as it is where that is wider."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()


def _weigh(features_TF: Tensor, weight_TE: Tensor | None) -> Tensor:
    """Each expert's features times its weight (fp32), rounded once to the dtype of the features; None stands for 1."""
    if weight_TE is None:
        return features_TF
    weighed_TER = _of_experts(features_TF, weight_TE) * weight_TE.unsqueeze(-1)
    if weighed_TER.dtype != features_TF.dtype:
        weighed_TER = weighed_TER.to(features_TF.dtype)
    return weighed_TER.view(features_TF.shape)


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
