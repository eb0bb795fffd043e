"""The dense products that a layer is made of: down to features and logits, up again, and their gradients.

Shapes: `T` tokens, `D` in-features, `E` experts, `R` rank, `F = E * R` (the rank dims of all experts side by side), `P`
columns of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def side_by_side(factor_EXR: Tensor) -> Tensor:
    """(E, X, R) -> (X, F): the experts' columns next to one another, for one dense product."""
    return joined(factor_EXR.unbind(0))


def per_expert(grad_FX: Tensor, num_experts: int) -> Tensor:
    """(F, X) -> (E, X, R): a gradient on its way back to the factor."""
    num_features, num_rows = grad_FX.shape
    return grad_FX.view(num_experts, num_features // num_experts, num_rows).transpose(1, 2).contiguous()


def scaled_product(left: Tensor, right: Tensor, scale: float, plus: Tensor | None = None) -> Tensor:
    """`plus + scale * left @ right` in one kernel, the scale inside its fp32 sums; None stands for 0."""
    if plus is None:
        return torch.addmm(left.new_empty(()), left, right, beta=0.0, alpha=scale)
    return torch.addmm(plus, left, right, alpha=scale)


def features_and_logits(x_TD: Tensor, a_EDR: Tensor, weight_ED: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`x a` (T, F) in the dtype of `x` and `x W^T` (T, E) in fp32, of one product where the device lets it be."""
    if weight_ED is None:
        return x_TD @ side_by_side(a_EDR), None
    is_wide = x_TD.dtype.itemsize >= torch.float32.itemsize
    if not is_wide and (x_TD.dtype == torch.float16 or leaves_rounding_out(x_TD.device, x_TD.dtype)):
        return x_TD @ side_by_side(a_EDR), product_fp32(x_TD, weight_ED.t())
    columns_DP = columns(a_EDR, [weight_ED])
    num_features = columns_DP.shape[1] - weight_ED.shape[0]
    both_TP = x_TD @ columns_DP
    features_TF, rounded_TE = both_TP.split_with_sizes((num_features, weight_ED.shape[0]), dim=1)
    if is_wide:
        return features_TF, rounded_TE
    return features_TF, _with_remainder(rounded_TE, x_TD, columns_DP[:, num_features:])


def num_parts(grad_TE: Tensor | None, dtype: torch.dtype) -> int:
    """How many tensors of `dtype` hold an fp32 one: itself, or its rounding and the remainder. None has none."""
    return 0 if grad_TE is None else 1 + (grad_TE.dtype != dtype)


def exact_parts(grad_TE: Tensor, dtype: torch.dtype, out_TP: Tensor | None = None) -> Tensor:
    """(T, P): an fp32 tensor in `dtype`, its parts side by side; products with all of them lose nothing to `dtype`."""
    if out_TP is None:
        if grad_TE.dtype == dtype:
            return grad_TE
        out_TP = grad_TE.new_empty(grad_TE.shape[0], 2 * grad_TE.shape[1], dtype=dtype)
    rounded_TE, *remainder = out_TP.split(grad_TE.shape[1], dim=1)
    rounded_TE.copy_(grad_TE)
    if remainder:
        torch.sub(grad_TE, rounded_TE, out=remainder[0])
    return out_TP


def product_fp32(x_TD: Tensor, weight_DE: Tensor) -> Tensor:
    """`x W` with an fp32 result (or wider, as `x`) and without an fp32 copy of `x`, dearer than the product itself.

    Low-precision products accumulate in fp32 and round once at the end. Where the device cannot leave that rounding
    out, a second product returns what the first one rounded away: 16 bits of mantissa in all for bf16.
    """
    if x_TD.dtype.itemsize >= torch.float32.itemsize:
        return x_TD @ weight_DE
    if leaves_rounding_out(x_TD.device, x_TD.dtype):
        return torch.mm(x_TD, weight_DE, out_dtype=torch.float32)
    if x_TD.dtype == torch.float16:  # above 65,504 the first product is infinite, and its remainder no number
        return x_TD.float() @ weight_DE.float()
    return _with_remainder(x_TD @ weight_DE, x_TD, weight_DE)


def _with_remainder(rounded_TE: Tensor, x_TD: Tensor, weight_DE: Tensor) -> Tensor:
    """`x W` in fp32 from its rounding, by the product that is left when that is taken away."""
    remainder_TE = torch.addmm(rounded_TE, x_TD, weight_DE, beta=-1)
    return rounded_TE.float() + remainder_TE


@functools.cache
def leaves_rounding_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has, on this device, products of `dtype` with an fp32 result; asked once by trying."""
    x_11 = torch.ones(1, 1, device=device, dtype=dtype)
    try:
        return torch.mm(x_11, x_11, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # TypeError: this torch does not know the argument
        return False


def columns(a_EDR: Tensor | None, weights_ED: Sequence[Tensor], num_parts: int = 1) -> Tensor:
    """(D, P): what `x` meets on its way to features and logits, and their gradients on the way back, in one copy.

    Args:
        a_EDR: of the features, if there are any
        weights_ED: of the logits
        num_parts: of the logits' gradient, see `exact_parts`; each meets the weights
    """
    of_features = () if a_EDR is None else a_EDR.unbind(0)
    return joined((*of_features, *num_parts * [weight_ED.t() for weight_ED in weights_ED]))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Their columns next to one another; one tensor as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim=1)


def sum_of_parts(found_PD: Tensor, num_parts: int) -> Tensor:
    """(P / parts, D): what the parts of a gradient have found, together."""
    return found_PD if num_parts == 1 else found_PD.unflatten(0, (num_parts, -1)).sum(0)
