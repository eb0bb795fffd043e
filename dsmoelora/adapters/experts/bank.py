"""The factors of a layer's experts."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.dora import DoraRows
from dsmoelora.adapters.experts.function import Mixture, RoutedExperts
from dsmoelora.adapters.precision import typed
from dsmoelora.adapters.starts.draws import draw_a, draw_b, draw_m, drawn
from dsmoelora.config import AdapterConfig

if TYPE_CHECKING:
    from dsmoelora.adapters.contrastive.losses import ContrastOfTokens
    from dsmoelora.adapters.routers.linear import LinearRouter


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
        mixture: how they are mixed
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
        power_for_input = config.gate_power_scope == "factors_and_input"
        self.mixture = Mixture(config.scale, config.gate_power, power_for_input, config.shared_experts)
        self._router: tuple[LinearRouter, ...] = ()  # no module of this one

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

    def join(self, router: LinearRouter) -> None:
        """Have this router decide, for the tokens that the experts themselves read, where no gates are given."""
        self._router = (router,)

    @property
    def scale(self) -> float:
        """s."""
        return self.mixture.scale

    @property
    def joined_parameters(self) -> list[nn.Parameter]:
        """Of another module, which this one reads."""
        return [router.weight for router in self._router]

    def forward(
        self,
        base_TO: Tensor | None,
        x_TD: Tensor,
        gate_TL: Tensor | None = None,
        attachment: ContrastOfTokens | None = None,
        ratio_LO: Tensor | None = None,
    ) -> Tensor:
        """(T, O): `base_TO + s sum_e gate_e (x a_e) m_e b_e^T` over the experts that lie here; see `RoutedExperts`.

        Args:
            base_TO, x_TD, ratio_LO: as of `RoutedExperts`
            gate_TL: the same; None where the router that was joined decides, or all gates are 1
            attachment: what else is done to the output
        """
        router = self._router[0] if gate_TL is None and self._router else None
        weight = None if router is None else typed(router.weight, x_TD)
        factors = typed(self.a, x_TD), typed(self.b, x_TD), typed(self.m, x_TD), ratio_LO
        output: Tensor = RoutedExperts.apply(self.mixture, router, base_TO, x_TD, gate_TL, weight, *factors)
        return output if attachment is None else attachment.attach(output, *factors)
