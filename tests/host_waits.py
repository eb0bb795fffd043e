"""Where the host waits for the accelerator: seen on a CPU by the operators that would make it wait."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostWaits(TorchDispatchMode):
    """Records what is sent and fetched.

    Attributes:
        copies: for every copy of a tensor to another device, whether the host went on meanwhile
        num_reads: numbers that were fetched one by one
        num_made: numbers of Python's that were made into tensors
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[bool] = []
        self.num_reads = self.num_made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.copies.append(kwargs.get("non_blocking", False))
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        self.num_made += args[0].numel() if func is torch.ops.aten.lift_fresh.default else 0
        return func(*args, **kwargs)
