"""Pure functions of wide tensors that a compiler may fuse into one pass over memory; they run as they stand otherwise.

Only what makes many passes over tensors as wide as a layer's input is worth it. A call into compiled code has a price
of its own on the host, so what a router does to its (T, E) numbers stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Region:
    """A function of tensors and numbers, eager until it is told otherwise.

    Compiled once for each width: code for a width that is known is several times faster on a CPU. The number of tokens
    may be any.

    Args:
        function: pure, its first two arguments have a row for each token; its bits must be the same compiled and eager
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, function)
        self._eager = self._call = function

    def __call__(self, *args: Any) -> Tensor:
        """What the function gives."""
        return self._call(*args)

    def use_compiled(self, example: tuple[Any, ...]) -> None:
        """Compile, and try it out forward and backward with an example whose first tensor gets a gradient.

        Raises:
            Exception: of any kind, from torch, where there is no compiler for the device; the region stays eager
        """
        self.use_eager()
        self._compiled(*example).sum().backward()
        self._call = self._compiled

    def use_eager(self) -> None:
        """As written."""
        self._call = self._eager

    @functools.cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        compiled = torch.compile(self._eager, fullgraph=True)

        def call(*args: Any) -> Tensor:
            for number, tensor in enumerate(arg for arg in args if isinstance(arg, Tensor)):
                has_tokens = number < 2
                if has_tokens:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                for dim in range(has_tokens, tensor.dim()):
                    torch._dynamo.mark_static(tensor, dim)
            return compiled(*args)

        return call
