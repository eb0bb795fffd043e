"""What the adapted layers of one model share: who hears them, where other experts are, and the tokens at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsmoelora.adapters.shared_input import Once

if TYPE_CHECKING:
    from dsmoelora.adapters.contrastive import ContrastiveLosses
    from dsmoelora.adapters.routing import RoutingLog

# (x_ND, gate_NL) -> (N, O): the output of this rank's L experts for N tokens
LocalExperts = Callable[[Tensor, Tensor], Tensor]


class Visit(Protocol):
    """Tokens of a layer on their way to the experts of all ranks."""

    @property
    def have_left(self) -> bool:
        """Whether another layer has sent them before: what takes long is the way back."""

    def through(self, experts: LocalExperts) -> Callable[[], Tensor]:
        """Wait for the tokens, apply this rank's experts, and send sums on their way back.

        Returns:
            what waits for these: (T, O), for this rank's tokens the sums over the experts of all ranks
        """


class Exchange(Protocol):
    """How tokens reach experts on other ranks (see `parallel.exchange`)."""

    def depart(self, of_input: Once, of_decision: Once, x_TD: Tensor, gate_TE: Tensor, out_features: int) -> Visit:
        """Send a layer's tokens and gates on their way.

        Args:
            of_input: what was made of the input by all layers that read it
            of_decision: what was made of the gates by all layers that follow them
            x_TD: this rank's tokens, the same tensor for all readers of an input
            gate_TE: fp32, for the experts of all ranks
            out_features: O
        """

    def of_all_experts(self, own_LX: Tensor) -> Tensor:
        """(L, X) of this rank's experts -> (E, X) of all; the gradient comes back as a sum over the ranks."""


@dataclass(frozen=True)
class BatchTokens:
    """What is known of the tokens of a micro-batch.

    Args:
        keys_BS: int32 from `token_keys`; None falls back to torch's own dropout and noise, which depend on how a batch
            is split
        real_BS: bool, False for padding and for rows that count nowhere; None stands for no padding
        sequences_BS: int64, where rows are packed: the number of each token's sequence
        prompt_BS: bool, the tokens that router `prompt` looks at; None leaves it to what the model is called with
        more_experts: than K that each of these tokens uses, where a router selects K (`adapter.top_k_warmup`)
    """

    keys_BS: Tensor | None = None
    real_BS: Tensor | None = None
    sequences_BS: Tensor | None = None
    prompt_BS: Tensor | None = None
    more_experts: int = 0
    _counts: dict[int, Tensor] = field(default_factory=dict, init=False)

    def counts(self, like_NE: Tensor) -> Tensor:
        """(N,) fp32: how many real tokens each of N tokens or sequences stands for."""
        if len(like_NE) not in self._counts:  # once for all layers
            self._counts[len(like_NE)] = self._count(like_NE)
        return self._counts[len(like_NE)]

    def _count(self, like_NE: Tensor) -> Tensor:
        if self.real_BS is None:
            return torch.ones(len(like_NE), device=like_NE.device)
        if len(like_NE) == self.real_BS.numel():
            return self.real_BS.flatten().float()
        assert len(like_NE) == len(self.real_BS), "a router sees all tokens, or each sequence once"
        return self.real_BS.sum(-1).float()


@dataclass(slots=True)
class AdapterContext:
    """Shared by all adapted layers of a model, for as long as it lives.

    Args:
        exchange: where experts are partitioned over ranks
        log: hears what routers do in training
        losses: of the experts' outputs in training; None where none is switched on, for they must know gates first
        tokens: of the micro-batch at hand. Whoever runs the model sets them before the forward pass, and they must stay
            until the backward pass is over, for a layer may be computed again there
        hooked: every router is called by itself and its gates are given to the experts, for those who have hooks there
    """

    exchange: Exchange | None = None
    log: RoutingLog | None = None
    losses: ContrastiveLosses | None = None
    tokens: BatchTokens = field(default_factory=BatchTokens)
    hooked: bool = False

    @contextmanager
    def hooks(self, handles: Sequence[RemovableHandle]) -> Iterator[None]:
        """Inside the block modules have these hooks, which look at what goes into routers and experts or comes out."""
        before, self.hooked = self.hooked, True
        try:
            yield
        finally:
            self.hooked = before
            for handle in handles:
                handle.remove()

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside the block nobody hears what routers do, and no loss is attached to an output."""
        log, losses = self.log, self.losses
        self.log = self.losses = None
        try:
            yield
        finally:
            self.log, self.losses = log, losses
