"""One router for the layers of a block: a feed-forward block (MixLoRA) or a decoder layer (MiLoRA).

In a feed-forward block each layer has all the experts (Li et al. 2024, arXiv 2404.15159); in a decoder layer each
layer is one of them (Zhang et al. 2024, arXiv 2410.18035).

The router is a module of the block, `mlp.router`, and is called once for a call of the block, with the block's input:
just before a feed-forward block itself, or before the first module that a decoder layer calls (activation checkpointing
computes a decoder layer again without calling it). What it decides lies in a `BlockGates` for as long as the block is
computed; the block's adapted layers read it there. So ZeRO-3 gathers the router's parameters for one module alone,
whichever of the layers comes first, and what routers report is counted once a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from dsmoelora.adapters.shared_input import Once
from dsmoelora.config.adapter_options import Style
from dsmoelora.errors import ModelError


class BlockGates:
    """What the router of a block has decided for the tokens that the block is called with.

    Args:
        name: of the block in the model
        in_features: that its router reads
        style: what kind of block it is

    Attributes:
        once: what was made of the decision by the layers that follow it
    """

    def __init__(self, name: str, in_features: int, style: Style) -> None:
        self.name, self.once, self._in_features, self._style = name, Once(), in_features, style
        self._entrance: str | None = None
        self._gate_TE: Tensor | None = None
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module, router: nn.Module) -> None:
        """Make the router part of the block, and have it called with what the block is called with."""
        block = model.get_submodule(self.name)
        entrances = dict(block.named_children()) if self._style == "decoder_layer" else {"": block}
        self._hooks = [
            module.register_forward_pre_hook(partial(self._enter, name, router), with_kwargs=True)
            for name, module in entrances.items()
        ]
        # also where recomputation ends a forward pass half-way with an exception
        self._hooks.append(block.register_forward_hook(self._forget, always_call=True))
        block.router = router

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`, if it was not undone before."""
        block = model.get_submodule(self.name)
        if hasattr(block, "router"):
            for hook in self._hooks:
                hook.remove()
            del block.router

    def read(self, layer: str, num_tokens: int) -> Tensor:
        """Gates (T, E) for a layer of the block.

        Args:
            layer: its name
            num_tokens: T

        Raises:
            ModelError: the layer does not see the tokens that the block was called with
        """
        if self._gate_TE is None or len(self._gate_TE) != num_tokens:
            raise ModelError(
                f"{layer} takes its gates from the router of {self.name} (adapter.style: {self._style}), but the model "
                "calls it with other tokens than the block, or outside of it. Name it in adapter.lora_modules instead, "
                "or set adapter.style to per_linear."
            )
        return self._gate_TE

    def _enter(self, name: str, router: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide where the block begins: for the first argument of the module that is called first in it."""
        self._entrance = name if self._entrance is None else self._entrance
        if name != self._entrance:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        num_inputs = self._in_features
        if x.shape[-1] != num_inputs:
            raise ModelError(
                f"{self.name} is called with {x.shape[-1]} features, but adapter.style {self._style} expects "
                f"{num_inputs} of it: it cannot be routed so. Set adapter.style to per_linear."
            )
        self._gate_TE, self.once = router(x.reshape(-1, num_inputs)), Once()

    def _forget(self, *_: Any) -> None:
        self._gate_TE, self.once = None, Once()


class BlockRouter(nn.Module):
    """Stands in a layer for the router of its block.

    Args:
        layer: name of the layer
        gates: of the block
        expert: which of the experts the layer is; None where it has all of them
    """

    def __init__(self, layer: str, gates: BlockGates, expert: int | None) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.gates, self._layer = gates, layer
        self._own = None if expert is None else slice(expert, expert + 1)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 of the layer's own experts."""
        gate_TE = self.gates.read(self._layer, len(x_TD))
        return gate_TE if self._own is None else gate_TE[:, self._own]
