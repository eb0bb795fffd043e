"""How routers have used their experts for some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsmoelora.adapters.routing.sums import RoutingSums


@dataclass(frozen=True)
class Routing:
    """What happened in some optimizer steps, over all ranks; layers and their experts in the order of the model.

    Args:
        num_tokens: real tokens
        layers: names
        tokens: for each layer, how many tokens used each expert
        gates: for each layer, the sum of each expert's gate
        entropy: for each layer, the sum over tokens of the gates' entropy, in nats
        idle_steps: for each layer, for how many steps up to now no token has used an expert
    """

    num_tokens: int
    layers: list[str]
    tokens: list[list[float]]
    gates: list[list[float]]
    entropy: list[float]
    idle_steps: list[list[int]]


class HealthWindow:
    """The sums of all steps since somebody last looked.

    Args:
        names: of the routers
        sizes: number of experts of each
        sums: of a step
    """

    def __init__(self, names: list[str], sizes: list[int], sums: RoutingSums) -> None:
        self._names, self._sizes, self._sums = names, sizes, sums
        self._window = torch.zeros_like(sums.flat)
        self._idle = torch.zeros_like(sums.totals(sums.flat).choices)
        self._num_tokens = 0

    def add(self, flat: Tensor, num_tokens: int) -> None:
        """Take in the sums of a step, over all ranks."""
        self._window += flat
        self._idle = torch.where(self._sums.totals(flat).choices > 0, 0.0, self._idle + 1)
        self._num_tokens += num_tokens

    def take(self) -> Routing:
        """What happened since the last call."""
        totals = self._sums.totals(self._window)
        choices, gates, entropy, idle = (
            part.cpu() for part in (totals.choices, totals.gates, totals.entropy, self._idle)
        )
        routing = Routing(
            self._num_tokens,
            self._names,
            [part.tolist() for part in choices.split(self._sizes)],
            [part.tolist() for part in gates.split(self._sizes)],
            [float(part.sum()) for part in entropy.split(self._sizes)],
            [[int(steps) for steps in part.tolist()] for part in idle.split(self._sizes)],
        )
        self._window.zero_()
        self._num_tokens = 0
        return routing

    def state(self) -> dict[str, Any]:
        """JSON-able, the same on all ranks."""
        return {"idle": self._idle.tolist(), "window": self._window.tolist(), "num_tokens": self._num_tokens}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        for tensor, values in ((self._idle, state["idle"]), (self._window, state["window"])):
            tensor.copy_(torch.tensor(values, dtype=torch.float64))
        self._num_tokens = state["num_tokens"]
