"""The contrastive losses of a model: what they weigh, which tokens they see, where their gradient enters.

The gradient is added where the gradient of a layer's output passes by (`WithContrast`): the loss is computed there,
in the backward pass, from the parameters and the sampled tokens alone, which is all that is kept for it. So a layer
that is computed again under activation checkpointing counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.contrastive.formula import coactive_together, experts_apart, unit_features
from dsmoelora.adapters.contrastive.sample import TokenSample, sample_tokens
from dsmoelora.adapters.experts.function import outgoing
from dsmoelora.adapters.experts.products import side_by_side
from dsmoelora.adapters.experts.similarity import cross_grams
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.config import LossesConfig
from dsmoelora.seeds import derive_seed

NAMES = ("contrastive", "contrastive_coactive")


class ExpertGroup(Protocol):
    """Where the experts of a layer are; all of it can be differentiated (see `parallel.expert_group`)."""

    def to_experts(self, x_TD: Tensor) -> Tensor:
        """(M, D): tokens that the experts here see, of this rank's T."""

    def from_experts(self, features_MLR: Tensor) -> Tensor:
        """(T, E, R): features of this rank's tokens from the experts of all ranks."""

    def cross_grams(self, b_LOR: Tensor) -> Tensor:
        """(E, E, R, R) fp32: `b_e^T b_f` of all pairs of experts of all ranks."""


class AllHere:
    """The `ExpertGroup` of a rank that holds all experts."""

    def to_experts(self, x_TD: Tensor) -> Tensor:
        """(T, D)."""
        return x_TD

    def from_experts(self, features_MLR: Tensor) -> Tensor:
        """(T, E, R)."""
        return features_MLR

    def cross_grams(self, b_LOR: Tensor) -> Tensor:
        """(E, E, R, R) fp32."""
        return cross_grams(b_LOR)


@dataclass(frozen=True)
class Contrast:
    """How the losses look at a layer in a micro-batch.

    Args:
        sample: which tokens they see
        active_BNE: bool, real tokens and their selected experts
        weights: what a row of this layer counts in the loss that the backward pass is of, in the order of `NAMES`
        tau: temperature
        num_used: experts of a token at most
        group: where the experts are
        hear: gets the values (2,), summed over rows, when the backward pass comes by
    """

    sample: TokenSample
    active_BNE: Tensor
    weights: tuple[float, float]
    tau: float
    num_used: int
    group: ExpertGroup
    hear: Callable[[Tensor], None]

    def values(
        self, x_BND: Tensor, a_LDR: Tensor, b_LOR: Tensor, m_LRR: Tensor | None = None, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both losses, fp32, summed over rows; 0 for one that is switched off.

        Args:
            x_BND: the sampled tokens
            a_LDR, b_LOR: factors
            m_LRR: mixers, where there are any
            others: what `function.outgoing` takes beside `b` and `m`
        """
        x_MD = self.group.to_experts(x_BND.flatten(0, 1)).float()
        features_MLR = (x_MD @ side_by_side(a_LDR.float())).unflatten(-1, (len(a_LDR), -1))
        if m_LRR is not None:  # Grams of b m^T would square what m cancels
            features_MLR = torch.einsum("mlr,lrq->mlq", features_MLR, m_LRR.float())
        features_BNER = self.group.from_experts(features_MLR).unflatten(0, x_BND.shape[:2])
        grams_EGRQ = self.group.cross_grams(outgoing(b_LOR, None, *others))
        unit_BNER = unit_features(features_BNER, grams_EGRQ)
        given = unit_BNER, grams_EGRQ, self.active_BNE
        off = x_MD.new_zeros(())
        settings = self.tau, self.num_used
        apart = experts_apart(*given, self.sample.same_BNM, *settings).sum() if self.weights[0] else off
        together = coactive_together(*given, self.sample.real_BN, self.tau).sum() if self.weights[1] else off
        return apart, together


@dataclass(frozen=True)
class ContrastOfTokens:
    """What a layer attaches to its output in a micro-batch.

    Args:
        x_BND: the sampled tokens as the experts see them
        contrast: how the losses look at them; without them, for it outlives the forward pass, and under activation
            checkpointing they must not
    """

    x_BND: Tensor
    contrast: Contrast

    def attach(self, y_TO: Tensor, *factors: Tensor | None) -> Tensor:
        """The output of the layer's experts as it is; its gradient brings that of the losses along.

        Args:
            y_TO: (T, O), written to in place as far as autograd knows
            factors: `a`, `b` and what else makes the outputs, as `Contrast.values` takes them
        """
        output: Tensor = WithContrast.apply(y_TO, self.x_BND, self.contrast, *factors)
        return output


class WithContrast(torch.autograd.Function):
    """An output as it is; on the way back the losses' gradients are given to the factors and the sampled tokens.

    Saved are the parameters themselves (see `RoutedExperts`) and the sampled tokens.
    """

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, x_BND: Tensor, contrast: Contrast, *factors: Tensor | None) -> Tensor:
        """`y_TO`."""
        ctx.mark_dirty(y_TO)  # and not a view of it, which nobody could write to any more
        ctx.save_for_backward(x_BND, *factors)
        ctx.contrast = contrast
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """`grad_TO`, and the gradients of tokens and factors."""
        contrast: Contrast = ctx.contrast
        _, need_x, _, *need_factors = ctx.needs_input_grad
        needed = [need_x, *need_factors]
        with torch.enable_grad():
            inputs: list[Any] = [
                None if saved is None else saved.detach().requires_grad_(need)
                for saved, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            apart, together = contrast.values(*inputs)
            weighted = contrast.weights[0] * apart + contrast.weights[1] * together
            found = iter(torch.autograd.grad(weighted, [one for one, need in zip(inputs, needed, strict=True) if need]))
        contrast.hear(torch.stack((apart, together)).detach())
        grad_x, *grads = (next(found) if need else None for need in needed)
        return grad_TO, grad_x, None, *grads


def _layers(model: nn.Module) -> list[str]:
    return [name for name, layer in adapted_layers(model) if layer.experts.shapes["a"][0] > 1]


class ContrastiveLosses:
    """The contrastive losses of all layers of a model (see `AdapterContext.losses`).

    Args:
        model: adapted; layers with one expert take no part
        config: weights, temperature, tokens of a row
        device: where sums are kept
        num_used: experts of a token at most
        group: where experts are

    Attributes:
        sums: (2,) fp64, values of this rank's rows and layers in the step at hand
    """

    def __init__(
        self,
        model: nn.Module,
        config: LossesConfig,
        device: torch.device,
        num_used: int,
        group: ExpertGroup | None = None,
    ) -> None:
        self._config, self._num_used = config, num_used
        self._keys = {name: derive_seed("contrastive", name) for name in _layers(model)}
        self._group = group or AllHere()
        self._weights = (0.0, 0.0)
        self._num_rows = 0
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64, device=device)

    @property
    def loss_names(self) -> list[str]:
        """The losses that are switched on."""
        return [name for name in NAMES if getattr(self._config, name)] if self._keys else []

    def begin_step(self, num_rows: int, scale: float) -> None:
        """Forget the last step's sums.

        Args:
            num_rows: of the global batch
            scale: what the sum of all ranks' gradients is divided by later
        """
        self.sums.zero_()
        self._num_rows = num_rows
        if self._keys:
            per_row = scale / (len(self._keys) * num_rows)
            self._weights = (self._config.contrastive * per_row, self._config.contrastive_coactive * per_row)

    def of_layer(
        self,
        layer: str,
        x_TD: Tensor,
        gate_TE: Tensor,
        tokens: BatchTokens,
    ) -> ContrastOfTokens | None:
        """What a layer has to attach to its output; None where no loss is switched on.

        Args:
            layer: name
            x_TD: tokens as the experts see them
            gate_TE: of the router
            tokens: of the micro-batch, at least their keys and which are real
        """
        if not self.loss_names or layer not in self._keys:
            return None
        assert tokens.keys_BS is not None and tokens.real_BS is not None, "losses of outputs need to know the tokens"
        known = (tokens.keys_BS, tokens.real_BS, tokens.sequences_BS)
        sample = sample_tokens(*known, self._keys[layer], self._config.contrastive_tokens)
        places_N = sample.places_BN.flatten()
        x_BND = x_TD.index_select(0, places_N).view(*sample.places_BN.shape, -1)
        gate_BNE = gate_TE.detach().index_select(0, places_N).view(*sample.places_BN.shape, -1)
        active_BNE = (gate_BNE != 0) & sample.real_BN.unsqueeze(-1)
        tau = self._config.contrastive_temperature
        contrast = Contrast(sample, active_BNE, self._weights, tau, self._num_used, self._group, self._hear)
        return ContrastOfTokens(x_BND, contrast)

    def loss_values(self, sums: Tensor) -> Tensor:
        """The losses of the step at hand, those of `loss_names`: means over rows and layers.

        Args:
            sums: `self.sums`, over all ranks
        """
        places = [NAMES.index(name) for name in self.loss_names]
        return sums[places] / (max(1, len(self._keys)) * max(1, self._num_rows))

    def _hear(self, values: Tensor) -> None:
        self.sums += values
