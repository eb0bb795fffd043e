"""What several layers make of one input tensor (q, k and v; gate and up), made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class Once:
    """Things that several layers need, made at the first call that asks for them by name."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, what: str, make: Callable[[], Made]) -> Made:
        """The thing of that name."""
        if what not in self._made:
            self._made[what] = make()
        made: Made = self._made[what]
        return made

    def __contains__(self, what: str) -> bool:
        """Whether it has been made."""
        return what in self._made


class SharedInput:
    """An input and what was made of it: its dropped-out copy, its tokens on other ranks.

    Inputs are compared by where their numbers lie: ZeRO-3 hands every module a tensor object of its own.

    Args:
        x: the input of the first layer that reads it
        dropout_key: of that layer, which also names it; all readers see one dropout mask

    Attributes:
        once: what was made of it
    """

    def __init__(self, x: Tensor, dropout_key: int) -> None:
        self._storage = x.untyped_storage()  # nobody else gets this memory as long as it is here
        self._state = _state_of(x)
        self.once = Once()
        self.dropout_key = dropout_key
        self._readers = {dropout_key}

    def admits(self, x: Tensor, dropout_key: int) -> bool:
        """Whether a layer reads these very numbers, unchanged, in the same gradient mode and for the first time.

        A layer that reads them once more begins another forward pass.
        """
        is_new = dropout_key not in self._readers
        self._readers.add(dropout_key)
        return is_new and x.untyped_storage() is self._storage and self._state == _state_of(x)


class Siblings:
    """The layers of one module, such as attention, and the input that they read at the moment.

    Numbers and graph of that input are let go of when the module's forward ends, in a recomputation too.
    """

    def __init__(self) -> None:
        self._input: SharedInput | None = None
        self._hook: Any = None

    def attach(self, parent: nn.Module) -> None:
        """Forget the input when this module's forward ends, also with an exception."""
        self._hook = parent.register_forward_hook(self._forget, always_call=True)

    def detach(self) -> None:
        """Undo `attach`."""
        if self._hook is not None:
            self._hook.remove()

    def shared_input(self, x: Tensor, dropout_key: int) -> SharedInput:
        """What was made of `x` so far, if the layer before read it too.

        Args:
            x: input of a layer
            dropout_key: of the layer
        """
        if self._input is None or not self._input.admits(x, dropout_key):
            self._input = SharedInput(x, dropout_key)
        return self._input

    def _forget(self, *_: Any) -> None:
        self._input = None


def _state_of(x: Tensor) -> tuple[Hashable, ...]:
    version = -1 if x.is_inference() else x._version  # in-place writes count it up
    place = (x.storage_offset(), x.shape, x.stride())
    return place, x.dtype, x.requires_grad, torch.is_grad_enabled(), version
