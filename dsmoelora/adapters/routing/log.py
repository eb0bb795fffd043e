"""Where the routers of a model report what they do, for losses, selection biases and health."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routers.bias import SigmoidBiasRouter, move_biases
from dsmoelora.adapters.routing.health import HealthWindow, Routing
from dsmoelora.adapters.routing.losses import LossesOfTokens, RouterLosses
from dsmoelora.adapters.routing.sums import RoutingSums
from dsmoelora.config import LossesConfig


class RoutingLog:
    """Listens to all routers of a model while it is open (see `AdapterContext.log`).

    Args:
        model: adapted; a layer here is a router, whether it serves one linear layer or a whole block
        config: weights of the losses
        device: where sums are kept
    """

    def __init__(self, model: nn.Module, config: LossesConfig, device: torch.device) -> None:
        layers = dict(routers(model))
        names = list(layers)
        self._sizes = [router.shapes["weight"][0] for router in layers.values()]
        self._place = {name: place for place, name in enumerate(names)}
        self._biased = [router for router in layers.values() if isinstance(router, SigmoidBiasRouter)]
        self._sums = RoutingSums(self._sizes, device)
        self._losses = RouterLosses(self._sizes, config, device)
        self._window = HealthWindow(names, self._sizes, self._sums)
        self._num_tokens = 0
        self._is_open = False

    @property
    def sums(self) -> Tensor:
        """Of the step at hand on this rank, fp64, to be summed over all ranks."""
        return self._sums.flat

    @property
    def loss_names(self) -> list[str]:
        """The losses that are switched on."""
        return self._losses.names

    def begin_step(self, num_tokens: int, scale: float) -> None:
        """Forget the last step's sums.

        Args:
            num_tokens: real tokens of the global batch
            scale: what the sum of all ranks' gradients is divided by later
        """
        self.sums.zero_()
        self._num_tokens = num_tokens
        self._losses.begin_step(num_tokens, scale)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Open inside the block: for the forward pass alone, so that a layer that is computed again is not counted."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._sums.finish_forward()

    def losses_of(self, layer: str, logits_NE: Tensor, num_tokens_N: Tensor) -> LossesOfTokens | None:
        """What is to be added to the gradient of these logits. Recomputed layers must come by here as well."""
        if not self._losses.names:
            return None
        place = self._place[layer]
        if self._is_open:
            self._sums.add_logits(place, logits_NE, num_tokens_N)
        return self._losses.of_tokens(place, num_tokens_N)

    def add(self, layer: str, gate_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router decided for N tokens or sequences."""
        if self._is_open:
            self._sums.add_gates(self._place[layer], gate_NE, num_tokens_N)

    def loss_values(self, sums: Tensor) -> Tensor:
        """The losses of the step at hand, those of `loss_names`, with the counts of this very step.

        Args:
            sums: `self.sums`, over all ranks
        """
        values = self._losses.values(self._sums.totals(sums), self._num_tokens)
        return torch.stack(values) if values else sums[:0]

    def finish_step(self, sums: Tensor) -> None:
        """Take over the sums of all ranks after a step that was applied: balance, biases, health."""
        totals = self._sums.totals(sums)
        self._losses.finish_step(totals)
        self._window.add(sums, self._num_tokens)
        if self._biased:
            move_biases(self._biased, totals.choices.split(self._sizes))

    def take_window(self) -> Routing:
        """What happened since the last call."""
        return self._window.take()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON-able and the same on all ranks."""
        return {
            "shares": self._losses.shares.tolist(),
            "health": self._window.state(),
            "bias_steps": [router.bias_steps.tolist() for router in self._biased],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._losses.load_shares(torch.tensor(state["shares"], dtype=torch.float64))
        self._window.load_state(state["health"])
        for router, steps in zip(self._biased, state["bias_steps"], strict=True):
            router.bias_steps.copy_(torch.tensor(steps, dtype=torch.int32))
