"""What the adapted layers of one model know about the micro-batch at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsmoelora.adapters.shared_input import SharedInput

# (x_ND, gate_NL, selected_NL) -> (N, O): the output of this rank's L experts for N tokens
LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange(Protocol):
    """How tokens reach experts on other ranks (see `parallel.exchange`)."""

    def __call__(
        self,
        shared: SharedInput,
        x_TD: Tensor,
        gate_TE: Tensor,
        selected_TE: Tensor,
        experts: LocalExperts,
        out_features: int,
    ) -> Tensor:
        """(T, O): sums over the experts of all ranks for this rank's tokens.

        Args:
            shared: the input, for what its other readers have sent already
            x_TD: this rank's tokens, the same tensor for all readers of `shared`
            gate_TE: fp32, for the experts of all ranks
            selected_TE: bool
            experts: this rank's part of the layer
            out_features: O
        """

    def of_all_experts(self, own_LX: Tensor) -> Tensor:
        """(L, X) of this rank's experts -> (E, X) of all; the gradient comes back as a sum over the ranks."""


class RouterListener(Protocol):
    """Who hears what routers do (`routing.RoutingLog`); N counts tokens, or sequences where they are routed."""

    def with_losses(self, layer: str, logits_NE: Tensor, num_tokens_N: Tensor) -> Tensor:
        """The logits to go on with."""

    def add(self, layer: str, gate_NE: Tensor, selected_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Hear of a decision."""


class Attachment(Protocol):
    """What a layer does to the output of its experts (`contrastive.ContrastOfTokens`)."""

    def attach(self, y_TO: Tensor, *factors: Tensor | None) -> Tensor:
        """The output to go on with; `factors` are what makes it, as `RoutedExperts` takes them."""


class OutputLosses(Protocol):
    """Losses of the experts' outputs (`contrastive.ContrastiveLosses`)."""

    def of_layer(
        self,
        layer: str,
        x_TD: Tensor,
        selected_TE: Tensor,
        keys_BS: Tensor,
        real_BS: Tensor,
        sequences_BS: Tensor | None,
    ) -> Attachment | None:
        """What a layer has to attach to its output; None for nothing."""


@dataclass
class BatchContext:
    """Shared by all adapted layers of a model; whoever runs the model fills it in before the forward pass.

    It must stay as it is until the backward pass is over, for a layer may be computed again there.

    Args:
        token_keys: (B, S) int32 from `token_keys`; None falls back to torch's own dropout and noise, which
            depend on how a batch is split
        real_BS: bool, False for padding and for rows that count nowhere; None stands for no padding
        sequences_BS: int64, where rows are packed: the number of each token's sequence
        prompt_BS: bool, the tokens that router `prompt` looks at; None leaves it to what the model is called with
        prompts: what router `prompt` remembers of that
        exchange: where experts are partitioned over ranks
        log: hears what routers do in training; stays when the micro-batch goes
        losses: of the experts' outputs in training; stays too
    """

    token_keys: Tensor | None = None
    real_BS: Tensor | None = None
    sequences_BS: Tensor | None = None
    prompt_BS: Tensor | None = None
    log: RouterListener | None = None
    losses: OutputLosses | None = None
    prompts: PromptMemory = field(default_factory=lambda: PromptMemory())
    exchange: Exchange | None = None
    _counted_BS: Tensor | None = None
    _counts: dict[bool, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the micro-batch."""
        self.token_keys = self.real_BS = self.sequences_BS = self.prompt_BS = self._counted_BS = None
        self._counts = {}

    def attachment(self, layer: str, x_TD: Tensor, selected_TE: Tensor) -> Attachment | None:
        """What a layer has to attach to the output of its experts.

        Args:
            layer: name
            x_TD: tokens as the experts see them
            selected_TE: bool
        """
        if self.losses is None:
            return None
        assert self.token_keys is not None and self.real_BS is not None, "losses of outputs need to know the tokens"
        return self.losses.of_layer(layer, x_TD, selected_TE, self.token_keys, self.real_BS, self.sequences_BS)

    def real_tokens(self, like_NE: Tensor) -> Tensor:
        """(N,) fp32: how many real tokens each of N tokens or sequences stands for."""
        if self.real_BS is None:
            return torch.ones(len(like_NE), device=like_NE.device)
        per_token = len(like_NE) == self.real_BS.numel()
        assert per_token or len(like_NE) == len(self.real_BS), "a router sees all tokens, or each sequence once"
        if self._counted_BS is not self.real_BS:
            self._counted_BS, self._counts = self.real_BS, {}
        if per_token not in self._counts:  # once for all layers
            counts_N = self.real_BS.flatten() if per_token else self.real_BS.sum(-1)
            self._counts[per_token] = counts_N.float()
        return self._counts[per_token]


@dataclass
class PromptMemory:
    """The last prompt that a model was called with, see `routers.prompt`.

    Args:
        prompt_BS: bool, which tokens of the call at hand are the prompt
        gates: by layer, the gates (B, E) and selected experts (B, E) of that prompt, once it was routed
        goes_on: the call at hand goes on from the prompt: its gates hold
        is_generating: `generate` runs, all whose calls but the first go on
        watch: the hook of the model that fills this in
    """

    prompt_BS: Tensor | None = None
    gates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    goes_on: bool = False
    is_generating: bool = False
    watch: RemovableHandle | None = None
