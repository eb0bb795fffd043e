"""What a shard holds, without its numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from dsmoelora.adapters import Factor
from dsmoelora.optim.rows import Segment, Trainable

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
NUM_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class ShardLayout:
    """What one shard holds.

    Args:
        segments: its segments; offsets count from the start of its flat tensors
        dtypes: dtype of each of its flat tensors in safetensors' words, by the tensor's name (`value`, `exp_avg`)
    """

    segments: list[Segment]
    dtypes: dict[str, str]

    def kept(self, pieces: list[list[int]]) -> ShardLayout:
        """Parts of its segments.

        Args:
            pieces: of each the elements `[start, stop)` and the offset at which they lie
        """
        ends = [one.span.stop for one in self.segments]
        return ShardLayout(
            [Segment(self.segments[bisect_right(ends, at)].of, start, stop, at) for start, stop, at in pieces],
            self.dtypes,
        )


def encode_parameters(parameters: list[Trainable]) -> list[dict[str, Any]]:
    """Parameters as JSON; segments refer to them by their place in this list."""
    return [
        {"name": each.name, "layer": each.layer, "factor": each.factor.value, "shape": list(each.shape)}
        for each in parameters
    ]


def decode_parameters(encoded: list[dict[str, Any]]) -> list[Trainable]:
    """The reverse of `encode_parameters`."""
    return [
        Trainable(each["name"], each["layer"], Factor(each["factor"]), tuple(int(n) for n in each["shape"]))
        for each in encoded
    ]
