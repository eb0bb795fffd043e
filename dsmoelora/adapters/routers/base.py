"""What routers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.context import AdapterContext
from dsmoelora.adapters.experts.function import Projection
from dsmoelora.adapters.precision import typed
from dsmoelora.adapters.routers.rules import Rule, largest, softmax_over
from dsmoelora.seeds import empty_start, generator


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


class TokenRouter(nn.Module):
    """A router that looks at each token by itself, so that its logits may come out of the experts' own product.

    Where the experts of its layer read the input that it reads, it makes their features too (`Projection`): one pass
    over the input, forward and backward, instead of two.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bank: tuple[Any, ...] = ()  # no module of this one

    def join(self, bank: Any) -> None:
        """Make the features of this `ExpertBank` from now on, and give them back beside the decision."""
        self._bank = (bank,)

    @property
    def joined_factors(self) -> list[nn.Parameter]:
        """Parameters of another module that this one reads."""
        return [bank.a for bank in self._bank]

    def project(self, x_TD: Tensor, *weights_ED: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """`x_TD` to go on with, the logits of all weights (T, F) fp32, and the features, if these are made here."""
        factors = [typed(a_EDR, x_TD) for a_EDR in self.joined_factors]
        is_forked = any(bank.is_forked for bank in self._bank)
        weights = (typed(weight_ED, x_TD) for weight_ED in weights_ED)
        x_TD, *features, logits_TF = Projection.apply(x_TD, is_forked, factors[0] if factors else None, *weights)
        return x_TD, logits_TF, tuple(features) if factors else ()


@dataclass(frozen=True)
class TopKRule:
    """Softmax over the K largest, 0 for the rest: the full softmax renormalised over its K largest entries.

    Args:
        top_k: K
        context: of the model, which knows how many more experts than K a token of the call at hand uses
    """

    top_k: int
    context: AdapterContext

    @property
    def num_used(self) -> int:
        """Experts of a token in the call at hand."""
        return self.top_k + self.context.tokens.more_experts

    def __call__(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """A `Rule`."""
        selected_TE = largest(logits_TE, self.num_used)
        return softmax_over(logits_TE, selected_TE), selected_TE


class Report:
    """What a router says to the log of its model, if there is one, in training.

    Args:
        place: of the router
    """

    def __init__(self, place: RouterPlace) -> None:
        self._layer, self._context = place.layer, place.context

    def decide(self, logits_NE: Tensor, rule: Rule, training: bool) -> tuple[Tensor, Tensor]:
        """Gates and selected experts (N, E) of N tokens or sequences by a rule, with the losses and the log heard."""
        log = self._context.log
        if log is None or not training:
            return rule(logits_NE)
        num_tokens_N = self._context.tokens.counts(logits_NE)
        gate_NE, selected_NE = rule(log.with_losses(self._layer, logits_NE, num_tokens_N))
        log.add(self._layer, gate_NE, selected_NE, num_tokens_N)
        return gate_NE, selected_NE
