"""The factors of a layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.dora import DoraRows
from dsmoelora.adapters.experts.function import RoutedExperts, routed_experts
from dsmoelora.adapters.precision import typed
from dsmoelora.adapters.starts.draws import draw_a, draw_b, draw_m, drawn
from dsmoelora.config import AdapterConfig

if TYPE_CHECKING:
    from dsmoelora.adapters.contrastive.losses import ContrastOfTokens


class Factor(Enum):
    """The role of a trainable tensor in its layer."""

    A = "a"
    B = "b"
    M = "m"
    MAGNITUDE = "magnitude"
    ROUTER = "router"


class ExpertBank(nn.Module):
    """The factors of this rank's experts of a layer: `a` (L, D, R) and `b` (L, O, R), see `starts`.

    Experts of kind `moslora` have a mixer `m` (L, R, R) between them, those of kind `dora` a `magnitude` (L, O) and the
    module `rows` that reads it.

    Args:
        in_features: D
        out_features: O
        config: rank, number of experts, scale, gate power
        layer_name: with the seed and the expert's number it decides the initial values
        like: tensor whose dtype and device the factors take
        experts: which of all experts lie here

    Attributes:
        held: `experts`
        is_forked: `a` and the input get other gradients of the features, see `Projection`
        shapes: of each parameter by name, over the experts of all ranks (ZeRO-3 empties a parameter's own shape)
    """

    def __init__(
        self, in_features: int, out_features: int, config: AdapterConfig, layer_name: str, like: Tensor, experts: range
    ) -> None:
        super().__init__()
        num_experts, rank = config.num_in_layer, config.r
        self.shapes: dict[str, tuple[int, ...]] = {
            "a": (num_experts, in_features, rank),
            "b": (num_experts, out_features, rank),
        }
        self.held = experts
        self.scale = config.scale
        self.gate_power = config.gate_power
        self.is_forked = config.gate_power != 1.0 and config.gate_power_scope == "factors"

        def start(name: str, num_rows: int, draw: Callable[[Tensor, torch.Generator], None]) -> nn.Parameter:
            start_LXR = drawn((config.seed, layer_name, name), experts, num_rows, rank, draw)
            return nn.Parameter(start_LXR.to(like.dtype).to(like.device))

        self.a = start("a", in_features, partial(draw_a, init=config.init))
        self.b = start("b", out_features, partial(draw_b, init=config.init))
        self.m: nn.Parameter | None = None
        if config.expert == "moslora":
            self.shapes["m"] = (num_experts, rank, rank)
            self.m = start("m", rank, partial(draw_m, init=config.mixer_init))
        self.rows: DoraRows | None = None
        if config.expert == "dora":
            self.shapes["magnitude"] = (num_experts, out_features)
            self.magnitude = nn.Parameter(torch.ones_like(self.b[..., 0]))
            self.rows = DoraRows(self.a, self.b, self.magnitude, config.scale, config.gate_power)

    def forward(
        self,
        base_TO: Tensor | None,
        x_TD: Tensor,
        gate_TL: Tensor,
        selected_TL: Tensor,
        attachment: ContrastOfTokens | None = None,
        ratio_LO: Tensor | None = None,
        features: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """(T, O): `base_TO + s sum_e gate_e (x a_e) m_e b_e^T` over the experts that lie here; see `RoutedExperts`.

        Args:
            base_TO, x_TD, gate_TL, selected_TL, ratio_LO: as of `routed_experts`
            attachment: what else is done to the output
            features: of `x_TD`, as `Projection` gives them, where the router has made them
        """
        a, *outgoing = typed(self.a, x_TD), typed(self.b, x_TD), typed(self.m, x_TD), ratio_LO
        output: Tensor
        if features:
            gates = (gate_TL, selected_TL)
            output = RoutedExperts.apply(base_TO, *features, *gates, *outgoing, self.scale, self.gate_power)
        else:
            options: dict[str, Any] = {"gate_power": self.gate_power, "forked": self.is_forked}
            output = routed_experts(base_TO, x_TD, gate_TL, selected_TL, a, *outgoing, scale=self.scale, **options)
        return output if attachment is None else attachment.attach(output, a, *outgoing)
