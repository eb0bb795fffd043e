"""What routers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsmoelora.adapters.context import AdapterContext
from dsmoelora.adapters.experts.function import RouterLogits
from dsmoelora.adapters.precision import typed
from dsmoelora.adapters.routers.rules import Rule, largest
from dsmoelora.seeds import empty_start, generator

if TYPE_CHECKING:
    from dsmoelora.adapters.routing.losses import LossesOfTokens


@dataclass(frozen=True)
class RouterPlace:
    """Where a router stands.

    Args:
        layer: name of its layer in the model
        in_features: D
        num_experts: E
        like: tensor whose dtype and device the parameters take
        seed: what the initial values derive from, together with the layer's name
        context: shared by all layers of the model
    """

    layer: str
    in_features: int
    num_experts: int
    like: Tensor
    seed: int
    context: AdapterContext

    @property
    def shape(self) -> tuple[int, int]:
        """(E, D)."""
        return self.num_experts, self.in_features

    def uniform_start(self) -> nn.Parameter:
        """A weight (E, D), uniform within `D^-1/2`, as `nn.Linear` starts."""
        bound = self.in_features**-0.5
        start = empty_start(self.shape).uniform_(-bound, bound, generator=generator(self.seed, self.layer, "router"))
        return nn.Parameter(start.to(self.like.dtype).to(self.like.device))

    def zero_start(self, *shape: int) -> nn.Parameter:
        """A parameter that starts at zero."""
        return nn.Parameter(torch.zeros(shape, dtype=self.like.dtype, device=self.like.device))


class TopK:
    """The K experts with the largest logits.

    Args:
        top_k: K
        context: of the model, which knows how many more experts than K a token of the call at hand uses
    """

    def __init__(self, top_k: int, context: AdapterContext) -> None:
        self._top_k, self._context = top_k, context

    def __call__(self, logits_TE: Tensor) -> Tensor:
        """A `Selection`."""
        return largest(logits_TE, self._top_k + self._context.tokens.more_experts)


class Report:
    """What a router says to the log of its model, if there is one, in training.

    Args:
        place: of the router
    """

    def __init__(self, place: RouterPlace) -> None:
        self._layer, self._context = place.layer, place.context

    def decide(self, logits_NE: Tensor, rule: Rule, training: bool) -> Tensor:
        """Gates (N, E) of N tokens or sequences by a rule, with the losses and the log heard."""
        log = self._context.log
        if log is None or not training:
            return rule(logits_NE)
        num_tokens_N = self._context.tokens.counts(logits_NE)
        losses = log.losses_of(self._layer, logits_NE, num_tokens_N)
        gate_NE = rule(logits_NE if losses is None else losses.attach(logits_NE))
        log.add(self._layer, gate_NE, num_tokens_N)
        return gate_NE

    def losses_of(self, logits_NE: Tensor, gate_NE: Tensor, training: bool) -> LossesOfTokens | None:
        """Have the log hear a decision on logits; and the losses whose gradient is still to be added to theirs."""
        log = self._context.log
        if log is None or not training:
            return None
        num_tokens_N = self._context.tokens.counts(logits_NE)
        log.add(self._layer, gate_NE, num_tokens_N)
        return log.losses_of(self._layer, logits_NE, num_tokens_N)


def logits_of(x_TD: Tensor, *weights_ED: Tensor) -> Tensor:
    """(T, all E): `x W^T` of all weights side by side, in fp32 or wider."""
    logits_TE: Tensor = RouterLogits.apply(x_TD, *(typed(weight_ED, x_TD) for weight_ED in weights_ED))
    return logits_TE
