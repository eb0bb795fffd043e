"""One router for the layers of a feed-forward block (MixLoRA, Li et al. 2024, arXiv 2404.15159).

The router is a module of the block, `mlp.router`, and is called once for a call of the block, with the block's input,
just before the block itself. What it decides lies in a `BlockGates` for as long as the block is computed; the block's
adapted layers read it there. So ZeRO-3 gathers the router's parameters for one module alone, whichever of the layers
comes first, and what routers report is counted once a block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dsmoelora.adapters.shared_input import Once
from dsmoelora.errors import ModelError


class BlockGates:
    """What the router of a block has decided for the tokens that the block is called with.

    Args:
        name: of the block in the model
        in_features: that its first linear layer reads

    Attributes:
        once: what was made of the decision by the layers that follow it
    """

    def __init__(self, name: str, in_features: int) -> None:
        self.name, self.once, self._in_features = name, Once(), in_features
        self._decision: tuple[Tensor, Tensor] | None = None
        self._hooks: list[Any] = []

    def attach(self, block: nn.Module, router: nn.Module) -> None:
        """Make the router part of the block, and have it called before the block is."""
        block.router = router
        self._hooks = [
            block.register_forward_pre_hook(self._route, with_kwargs=True),
            # also where recomputation ends a forward pass half-way with an exception
            block.register_forward_hook(self._forget, always_call=True),
        ]

    def detach(self, block: nn.Module) -> None:
        """Undo `attach`."""
        for hook in self._hooks:
            hook.remove()
        del block.router

    def read(self, layer: str, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Gates (T, E) and selected experts (T, E) for a layer of the block.

        Args:
            layer: its name
            num_tokens: T

        Raises:
            ModelError: the layer does not see the tokens that the block was called with
        """
        if self._decision is None or len(self._decision[0]) != num_tokens:
            raise ModelError(
                f"{layer} takes its gates from the router of {self.name} (adapter.style: ffn_block), but the model "
                "calls it with other tokens than the block, or outside of it. Name it in adapter.lora_modules instead, "
                "or set adapter.style to per_linear."
            )
        return self._decision

    def _route(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide for the tokens that the block is called with, its first argument."""
        x = args[0] if args else next(iter(kwargs.values()))
        num_inputs = self._in_features
        if x.shape[-1] != num_inputs:
            raise ModelError(
                f"{self.name} is called with {x.shape[-1]} features, but its first linear layer reads {num_inputs}: it "
                "is no feed-forward block that adapter.style ffn_block can route. Set adapter.style to per_linear."
            )
        self._decision, self.once = block.router(x.reshape(-1, num_inputs)), Once()

    def _forget(self, *_: Any) -> None:
        self._decision, self.once = None, Once()


class BlockRouter(nn.Module):
    """Stands in a layer for the router of its block.

    Args:
        layer: name of the layer
        gates: of the block
    """

    def __init__(self, layer: str, gates: BlockGates) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.gates, self._layer = gates, layer

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (T, E) fp32 and the selected experts (T, E) bool."""
        return self.gates.read(self._layer, len(x_TD))
