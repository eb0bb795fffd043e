"""A frozen linear layer whose weight is kept in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

One flat parameter in the model's dtype holds everything: first the 4-bit codes, two a byte, then the fp32 scale of each
block of 64 weights, 4.5 bits a weight in all. To ZeRO it is a parameter like any other, so it is cut, sent and gathered
as it is; its numbers mean nothing, and nobody may compute with them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dsmoelora.adapters.fingerprint import AsRead, at_places
from dsmoelora.errors import ModelError

BLOCK = 64  # weights that share a scale
BITS = 4 + 32 / BLOCK  # of a weight
CODE = "nf4"
Preparation = Callable[[Tensor], Tensor]  # of a whole weight (O, D), before it is packed
NEEDED = "bitsandbytes"


def check_installed() -> None:
    """Make sure that weights can be quantised.

    Raises:
        ModelError: the package that does it is missing
    """
    if importlib.util.find_spec(NEEDED) is None:
        raise ModelError(f"model.quantize is nf4, which needs {NEEDED}. pip install 'dsmoelora[quant]'")


def num_packed(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Numbers of `dtype` that hold a packed weight of this shape (O, D), of which O D is a multiple of 64."""
    return sum(_num_bytes(shape)) // dtype.itemsize


def packed(weight_OD: Tensor, dtype: torch.dtype) -> Tensor:
    """(P,) in `dtype`: the weight's codes and scales."""
    code, scale = _operators().quantize_4bit(weight_OD.contiguous(), BLOCK, CODE, torch.uint8)
    return torch.cat((code.flatten(), scale.float().view(torch.uint8).flatten())).view(dtype)


def unpacked(packed_P: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(O, D): the weight that `packed` stands for."""
    num_codes, num_scales = _num_bytes(shape)
    raw = packed_P.detach().view(torch.uint8)
    scale = raw[num_codes : num_codes + num_scales].view(torch.float32)
    weight_OD: Tensor = _operators().dequantize_4bit(raw[:num_codes].view(-1, 1), scale, BLOCK, CODE, shape, dtype)
    return weight_OD


class FrozenLinear4bit(nn.Linear):
    """`y = x W^T + bias`, W being unpacked for each product and forgotten after it.

    A layer becomes one while its model is built: see `model.quantizing`.

    Attributes:
        as_read: (NUM_VALUES,) fp32, numbers of the weight before it was packed, see `fingerprint`; None on ranks that
            have not read it
        was_finite: whether all of its numbers were
        prepare: what else is done to the weight first; None for nothing
    """

    as_read: Tensor | None = None
    was_finite = True
    prepare: Preparation | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        y: Tensor = _Product.apply(x, self.weight, self.shape)
        bias: Tensor | None = self.bias  # torch's types say that there is always one
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D) of the weight."""
        return self.out_features, self.in_features

    def pack(self, weight_OD: Tensor, dtype: torch.dtype) -> Tensor:
        """What the weight becomes, after a note of what it was."""
        self.as_read = at_places(weight_OD)
        self.was_finite = bool(torch.isfinite(weight_OD).all())
        if self.prepare is not None and self.was_finite:
            weight_OD = self.prepare(weight_OD)
        return packed(weight_OD, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear4bit:
        """Move or copy the layer (`to`, `cuda`, ...).

        Raises:
            ModelError: to another dtype (`float`, ...), which would make other codes of the weight's codes
        """
        dtype = self.weight.dtype
        wanted = fn(torch.empty(0, dtype=dtype, device=self.weight.device)).dtype
        if wanted != dtype:
            raise ModelError(
                f"A weight packed in 4 bits cannot be cast from {dtype} to {wanted}: it is codes, no numbers. "
                "Load the model in the dtype that it shall have (model.dtype)."
            )
        super()._apply(fn, recurse)
        return self

    def reset_parameters(self) -> None:
        """Nothing: a packed weight comes from a file."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take a weight as files have it, and pack it; under ZeRO-3 transformers calls this on rank 0."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dim() == 2:
            whole = weight.to(self.weight.device, self.weight.dtype)
            state_dict = {**state_dict, f"{prefix}weight": self.pack(whole, self.weight.dtype)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{super().extra_repr()}, {CODE}"


class _Product(torch.autograd.Function):
    """`x W^T`; kept for the backward pass is the parameter alone, which ZeRO-3 may empty and gather again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, packed_P: Tensor, shape: tuple[int, int]) -> Tensor:
        """(..., D) -> (..., O) in the dtype of `x`."""
        ctx.save_for_backward(packed_P)
        ctx.shape = shape  # type: ignore[attr-defined]
        return nn.functional.linear(x, unpacked(packed_P, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `x`."""
        (packed_P,) = ctx.saved_tensors
        return grad @ unpacked(packed_P, ctx.shape, grad.dtype), None, None


def packed_layers(model: nn.Module) -> dict[str, FrozenLinear4bit]:
    """Layers with a packed weight, by the name of that weight."""
    return {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, FrozenLinear4bit)}


def read_before_packing(model: nn.Module) -> AsRead:
    """What a fingerprint wants to know of packed weights, where this process has read them."""
    layers = packed_layers(model).items()
    return {name: (layer.shape, layer.as_read) for name, layer in layers if layer.as_read is not None}


def _num_bytes(shape: tuple[int, int]) -> tuple[int, int]:
    """Of codes and of scales."""
    numel = math.prod(shape)
    assert numel % BLOCK == 0, f"{shape} is not of whole blocks"
    return numel // 2, numel // BLOCK * 4


def _operators() -> Any:
    import bitsandbytes  # noqa: F401  # registers them

    return torch.ops.bitsandbytes
