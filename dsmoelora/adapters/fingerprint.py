"""Which base model something belongs to: a few numbers of each of its tensors, rounded to bf16.

A base that was altered anywhere by half a percent, or whose rows were permuted, is another one; a base that was loaded
in another dtype is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

NUM_VALUES = 8  # of a tensor
# fp16 flushes small numbers, and rounding twice may end a step of bf16 further.
_RTOL_OF_FP16, _ATOL_OF_FP16 = 2**-7, 2**-14


def places(numel: int) -> Tensor:
    """(NUM_VALUES,) indices spread evenly over a flattened tensor, its first and its last among them."""
    return torch.linspace(0, max(0, numel - 1), NUM_VALUES, dtype=torch.float64).long()


AsRead = Mapping[str, tuple[Sequence[int], Tensor]]  # by name: shape, and (NUM_VALUES,) numbers at `places`


def fingerprint(tensors: Iterable[tuple[str, Tensor]], as_read: AsRead = MappingProxyType({})) -> dict[str, Any]:
    """What tells one base from another; JSON-able.

    Args:
        tensors: whole parameters of the base by name, as it came
        as_read: what is known of those that are no longer as they came
    """
    named = [(name, tensor) for name, tensor in tensors if tensor.numel()]
    shapes = [(name, as_read[name][0] if name in as_read else tensor.shape) for name, tensor in named]
    values = [as_read[name][1] if name in as_read else at_places(tensor) for name, tensor in named]
    is_fp16 = any(tensor.dtype == torch.float16 for _, tensor in named)
    return described(shapes, values, is_fp16)


def at_places(tensor: Tensor) -> Tensor:
    """(NUM_VALUES,) fp32 numbers of a whole tensor at `places`, on the host."""
    return tensor.detach().flatten()[places(tensor.numel()).to(tensor.device)].float().cpu()


def described(shapes: Sequence[tuple[str, Sequence[int]]], values: Sequence[Tensor], is_fp16: bool) -> dict[str, Any]:
    """The fingerprint of tensors of these names and shapes, with these numbers (NUM_VALUES,) at `places`."""
    lines = {
        name: f"{'x'.join(map(str, shape))} {_hexadecimal(numbers)}"
        for (name, shape), numbers in zip(shapes, values, strict=True)
    }
    return {"is_fp16": is_fp16, "tensors": lines}


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Where two fingerprints differ: `model.norm.weight has other numbers`; None where they are of one base."""
    ours, theirs = found["tensors"], expected["tensors"]
    roughly = expected["is_fp16"] or found["is_fp16"]
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs:
            return f"{name} is missing" if name not in ours else f"{name} is new"
        shape, wanted = (line.partition(" ")[0] for line in (ours[name], theirs[name]))
        if shape != wanted:
            return f"{name} has shape {_list(shape)}, not {_list(wanted)}"
        if ours[name] != theirs[name] and not (roughly and _is_near(ours[name], theirs[name])):
            return f"{name} has other numbers"
    return None


def _list(shape: str) -> list[int]:
    return [int(size) for size in shape.split("x") if size]


def _hexadecimal(numbers: Tensor) -> str:
    bits = numbers.to(torch.bfloat16).view(torch.int16).tolist()
    return "".join(f"{each & 0xFFFF:04x}" for each in bits)


def _numbers(line: str) -> Tensor:
    text = line.partition(" ")[2]
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    return torch.tensor([each - 0x10000 * (each > 0x7FFF) for each in bits], dtype=torch.int16).view(torch.bfloat16)


def _is_near(one: str, other: str) -> bool:
    return torch.allclose(_numbers(one).float(), _numbers(other).float(), rtol=_RTOL_OF_FP16, atol=_ATOL_OF_FP16)
