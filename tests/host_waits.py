"""Where the host waits for the accelerator: seen on a CPU by the operators that would make it wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
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


# what a number on the accelerator decides in Python, or for a shape
_READING_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
_READING_METHODS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy"}  # on a CPU no operator shows them


class _ReadingMethods(TorchFunctionMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._names.append(_READING_METHODS[func])
        return func(*args, **(kwargs or {}))


class _ReadingOperators(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(at is not None and at.dtype == torch.bool for at in args[1])
        if name in _READING_OPERATORS or by_mask:
            self._names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Inside the block, by name in their order, what makes the host wait for numbers."""
    names: list[str] = []
    with _ReadingMethods(names), _ReadingOperators(names):
        yield names
