"""Bytes of the tensors that live while code runs, of tensors without memory too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make inside the block, from their birth to their end.

    Counted is what an allocator is asked for: rounding, fragments, and what a kernel takes for itself are not seen.

    Args:
        there: tensors whose storages are not counted, nor those of views of them

    Attributes:
        now: bytes that live
        peak: the most so far
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in there}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key, num_bytes)

    def _part(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes
