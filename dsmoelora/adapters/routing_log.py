"""What the routers of a model did in an optimizer step: the source of losses, of selection biases and of health.

Sums are kept on the device, in fp64, for all layers in one tensor, so that one all-reduce brings those of all ranks
together. Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.losses import LossWeights, WithRouterLosses
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routers.bias import SigmoidBiasRouter, move_biases
from dsmoelora.config import LossesConfig


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


class RoutingLog:
    """Listens to all routers of a model while it is open (see `BatchContext.log`).

    Args:
        model: adapted; a layer here is a router, whether it serves one linear layer or a whole block
        config: weights of the losses
        device: where sums are kept
    """

    def __init__(self, model: nn.Module, config: LossesConfig, device: torch.device) -> None:
        layers = dict(routers(model))
        self._config = config
        self._names = list(layers)
        self._sizes = [router.shapes["weight"][0] for router in layers.values()]
        self._place = {name: place for place, name in enumerate(self._names)}
        self._biased = [router for router in layers.values() if isinstance(router, SigmoidBiasRouter)]
        sizes = torch.tensor(self._sizes, dtype=torch.int64, device=device)
        self._layer_of = torch.arange(len(layers), device=device).repeat_interleave(sizes)
        self._uniform = (1.0 / sizes.double())[self._layer_of]
        num_all = len(self._layer_of)
        # in this order: choices, gates and probabilities of every expert; entropy and z of every layer
        self._parts = [num_all, num_all, num_all, len(layers), len(layers)]
        self.sums = torch.zeros(sum(self._parts), dtype=torch.float64, device=device)
        self._shares = self._uniform.clone()
        self._idle = torch.zeros(num_all, dtype=torch.float64, device=device)
        self._window = torch.zeros_like(self.sums)
        self._window_tokens = self._num_tokens = 0
        self._weights = LossWeights()
        self._is_open = False

    @property
    def loss_names(self) -> list[str]:
        """The losses that are switched on."""
        return [name for name in ("balance", "z") if getattr(self._config, name)] if self._names else []

    def begin_step(self, num_tokens: int, scale: float) -> None:
        """Forget the last step's sums.

        Args:
            num_tokens: real tokens of the global batch
            scale: what the sum of all ranks' gradients is divided by later
        """
        self.sums.zero_()
        self._num_tokens = num_tokens
        if self._names:
            per_token = scale / (len(self._names) * num_tokens)
            self._weights = LossWeights(self._config.balance * per_token, self._config.z * per_token)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Open inside the block: for the forward pass alone, so that a layer that is computed again is not counted."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def with_losses(self, layer: str, logits_NE: Tensor, num_tokens_N: Tensor) -> Tensor:
        """The logits, through whose gradient the losses speak. Recomputed layers must come by here as well."""
        if not self.loss_names:
            return logits_NE
        place = self._place[layer]
        if self._is_open:
            with torch.no_grad():
                log_total_N1 = logits_NE.logsumexp(-1, keepdim=True)
                share_NE = (logits_NE - log_total_N1).exp() * num_tokens_N.unsqueeze(-1)
                _, _, shares, _, z = self._views(self.sums)
                shares[place].add_(share_NE.sum(0))
                z[place].add_((log_total_N1.squeeze(-1).square() * num_tokens_N).sum())
        num_experts = self._sizes[place]
        shares_E = self._shares.split(self._sizes)[place].float()
        weights = LossWeights(self._weights.balance * num_experts, self._weights.z)
        logits: Tensor = WithRouterLosses.apply(logits_NE, num_tokens_N, shares_E, weights)
        return logits

    def add(self, layer: str, gate_NE: Tensor, selected_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router decided for N tokens or sequences."""
        if not self._is_open:
            return
        with torch.no_grad():
            choices, gates, _, entropy, _ = self._views(self.sums)
            place, num_tokens_N1 = self._place[layer], num_tokens_N.unsqueeze(-1)
            choices[place].add_((selected_NE * num_tokens_N1).sum(0))
            gates[place].add_((gate_NE * num_tokens_N1).sum(0))
            entropy[place].add_((torch.special.entr(gate_NE) * num_tokens_N1).sum())

    def loss_values(self, sums: Tensor) -> Tensor:
        """The losses of the step at hand, those of `loss_names`, with the counts of this very step.

        Args:
            sums: `self.sums`, over all ranks
        """
        choices, _, shares, _, z = sums.split(self._parts)
        per_layer = self._per_layer(self._shares_of(choices) / self._uniform * shares) / self._num_tokens
        values = {"balance": per_layer.mean(), "z": z.mean() / self._num_tokens}
        return torch.stack([values[name] for name in self.loss_names]) if self.loss_names else sums[:0]

    def finish_step(self, sums: Tensor) -> None:
        """Take over the sums of all ranks after a step that was applied: balance, biases, health."""
        choices, *_ = sums.split(self._parts)
        self._shares = self._shares_of(choices)
        self._idle = torch.where(choices > 0, 0.0, self._idle + 1)
        self._window += sums
        self._window_tokens += self._num_tokens
        if self._biased:
            move_biases(self._biased, choices.split(self._sizes))

    def take_window(self) -> Routing:
        """What happened since the last call."""
        window, idle = self._window.cpu(), self._idle.cpu()  # once for all layers
        choices, gates, _, entropy, _ = window.split(self._parts)
        routing = Routing(
            self._window_tokens,
            self._names,
            [part.tolist() for part in choices.split(self._sizes)],
            [part.tolist() for part in gates.split(self._sizes)],
            entropy.tolist(),
            [[int(steps) for steps in part.tolist()] for part in idle.split(self._sizes)],
        )
        self._window.zero_()
        self._window_tokens = 0
        return routing

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON-able and the same on all ranks."""
        return {
            "shares": self._shares.tolist(),
            "idle": self._idle.tolist(),
            "window": self._window.tolist(),
            "window_tokens": self._window_tokens,
            "bias_steps": [router.bias_steps.tolist() for router in self._biased],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        for name, tensor in {"shares": self._shares, "idle": self._idle, "window": self._window}.items():
            tensor.copy_(torch.tensor(state[name], dtype=torch.float64))
        self._window_tokens = state["window_tokens"]
        for router, steps in zip(self._biased, state["bias_steps"], strict=True):
            router.bias_steps.copy_(torch.tensor(steps, dtype=torch.int32))

    def _views(self, sums: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """By kind, by layer."""
        *per_expert, entropy, z = sums.split(self._parts)
        return *(part.split(self._sizes) for part in per_expert), entropy.split(1), z.split(1)

    def _per_layer(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self._names), dtype=values.dtype, device=values.device).index_add_(
            0, self._layer_of, values
        )

    def _shares_of(self, choices: Tensor) -> Tensor:
        """Each expert's share of its layer's choices; 1 / E where nobody chose."""
        total = self._per_layer(choices)[self._layer_of]
        return torch.where(total > 0, choices / total.clamp(min=1), self._uniform)
