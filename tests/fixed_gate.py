"""Gates that a test chooses."""

from __future__ import annotations

from torch import Tensor, nn

from dsmoelora.adapters import RoutedLinear


class FixedGate(nn.Module):
    """A router that gives every token the same gates."""

    def __init__(self, gate_E: Tensor) -> None:
        super().__init__()
        self.gate_E = gate_E

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gate_E.expand(x_TD.shape[0], -1)


def fix_gates(layer: RoutedLinear, gate_E: Tensor) -> None:
    """Give every token that the layer sees the same gates."""
    layer.router, layer.context.hooked = FixedGate(gate_E), True
