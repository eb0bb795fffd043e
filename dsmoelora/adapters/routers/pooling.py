"""What a router of prompts sees of one: its states, weighed and summed.

    pooled = sum_t w_t x_t / sum_t w_t

`mean` has w = 1 for the tokens of the prompt, `last` for the last of them alone. `attention` has w_t = exp(x_t v^T),
the shares of a softmax over the prompt, with a learned v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dsmoelora.adapters.experts.products import exact_parts, num_parts, product_fp32, sum_of_parts


def last_of(prompt_BS: Tensor) -> Tensor:
    """(B, S) bool: the last token of each prompt; none where there is no prompt."""
    return prompt_BS & (prompt_BS.flip(-1).cumsum(-1).flip(-1) == 1)


def softmax_weights(scores_BS: Tensor, prompt_BS: Tensor) -> Tensor:
    """(B, S): the softmax over a prompt up to a factor; the largest weight is 1, those outside of the prompt are 0."""
    lowest = torch.finfo(scores_BS.dtype).min
    largest_B1 = scores_BS.detach().where(prompt_BS, lowest).amax(-1, keepdim=True)
    return (scores_BS - largest_B1).masked_fill(~prompt_BS, -torch.inf).exp()


class PooledLogits(torch.autograd.Function):
    """`logits_BE = pooled x W^T` in fp32."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor, share_BS: Tensor) -> Tensor:
        """(B, E), for `x_TD` with T = B S.

        Args:
            x_TD: any dtype
            weight_ED: of the router
            share_BS: w, fp32 (or wider, as `x`) or bool; all 0 of a sequence, or at least 1 together
        """
        share_TB = _of_sequence(share_BS if share_BS.is_floating_point() else share_BS.to(x_TD.dtype))
        found_DP = product_fp32(x_TD.t(), exact_parts(share_TB, x_TD.dtype))
        pooled_BD = sum_of_parts(found_DP.t(), num_parts(share_TB, x_TD.dtype)) / _total(share_BS)
        of_shares = x_TD if ctx.needs_input_grad[2] else None  # type: ignore[attr-defined]
        ctx.dtype = x_TD.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(pooled_BD, weight_ED, share_BS, of_shares)  # type: ignore[arg-type]  # takes None
        return pooled_BD @ weight_ED.to(pooled_BD.dtype).t()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_BE: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the weight and of w in their dtypes."""
        pooled_BD, weight_ED, share_BS, x_TD = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, need_weight, need_share = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = grad_weight = grad_share = None
        grad_pooled_BD = grad_BE @ weight_ED.to(grad_BE.dtype) / _total(share_BS)
        if need_x:
            share_TB = _of_sequence(share_BS.to(ctx.dtype))  # type: ignore[attr-defined]
            grad_x = share_TB @ grad_pooled_BD.to(ctx.dtype)  # type: ignore[attr-defined]
        if need_weight:
            grad_weight = (grad_BE.t() @ pooled_BD).to(weight_ED.dtype)
        if need_share:  # of w_t: how much more than the pooled state its own says
            x_BSD = x_TD.view(*share_BS.shape, -1)
            along_BS1 = x_BSD @ grad_pooled_BD.to(x_TD.dtype).unsqueeze(-1)
            grad_share = (along_BS1.squeeze(-1) - (pooled_BD * grad_pooled_BD).sum(-1, keepdim=True)).to(share_BS.dtype)
        return grad_x, grad_weight, grad_share


def _total(share_BS: Tensor) -> Tensor:
    """(B, 1) fp32 (or wider): what the weights sum to; 1 where there are none."""
    dtype = torch.promote_types(share_BS.dtype, torch.float32)
    return share_BS.sum(-1, keepdim=True, dtype=dtype).clamp(min=1)


def _of_sequence(share_BS: Tensor) -> Tensor:
    """(T, B): the weight of a token, in the column of its sequence."""
    eye_BB = torch.eye(share_BS.shape[0], dtype=share_BS.dtype, device=share_BS.device)
    return (share_BS.unsqueeze(-1) * eye_BB.unsqueeze(1)).flatten(0, 1)
