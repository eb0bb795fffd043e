"""A linear layer with a router and a bank of low-rank experts beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dsmoelora.adapters.context import AdapterContext
from dsmoelora.adapters.experts.bank import ExpertBank
from dsmoelora.adapters.experts.function import with_shared
from dsmoelora.adapters.keyed.draws import keyed_dropout
from dsmoelora.adapters.precision import compute_dtype, of_base, without_autocast
from dsmoelora.adapters.routers import RouterPlace, build_router
from dsmoelora.adapters.routers.block import BlockRouter
from dsmoelora.adapters.routers.linear import LinearRouter, SingleExpertRouter
from dsmoelora.adapters.shared_input import Once, SharedInput, Siblings
from dsmoelora.adapters.targets.linear import Linear, features
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ModelError
from dsmoelora.seeds import derive_seed

if TYPE_CHECKING:
    from dsmoelora.adapters.contrastive.losses import ContrastiveLosses, ContrastOfTokens


class WeightReadPast(ModelError, AttributeError):
    """The model reads the weight of an adapted layer; to `hasattr` the layer has none."""


class RoutedLinear(nn.Module):
    """A frozen linear layer plus a routed mixture of low-rank experts.

        y = x W0^T + s sum_e gate_e(x) (x a_e) b_e^T

    Shared experts come after the routed ones, with gate 1.

    The parameters are read only inside `router.forward` and `experts.forward`: ZeRO-3 gathers a parameter when the
    module that owns it, or has said that it reads it, is called.

    Args:
        base: the layer to wrap; its parameters stay as they are
        config: of the layer
        name: of the layer in the model
        context: shared by all layers of the model
        experts: which of all experts lie on this rank
        siblings: which may read the same input
        block_router: where the layer takes its gates from the router of its block; None for a router of its own

    Attributes:
        num_routed: E, the experts that its router chooses from, which are not all in this layer where it is one of them
    """

    def __init__(
        self,
        base: Linear,
        config: AdapterConfig,
        name: str,
        context: AdapterContext,
        experts: range,
        siblings: Siblings,
        block_router: BlockRouter | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.context = context
        self.siblings = siblings
        self.dropout = config.lora_dropout
        self.dropout_key = derive_seed("dropout", name)
        like = base.weight
        in_features, out_features = features(base)
        place = RouterPlace(name, in_features, config.num_experts, like, config.seed, context)
        self.router = block_router or build_router(place, config)
        self.experts = ExpertBank(in_features, out_features, config, name, like, experts)
        self.num_routed = config.num_experts
        self._num_shared = config.shared_experts
        self._is_partitioned = len(experts) < config.num_in_layer
        # experts read the same tokens as the router, and nobody before them asks what it decides
        self._is_joined = isinstance(self.router, LinearRouter | SingleExpertRouter) and not (
            self.dropout or self._is_partitioned or config.expert == "dora"
        )
        if self._is_joined and isinstance(self.router, LinearRouter):
            self.experts.join(self.router)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        dtype = compute_dtype(x)
        with without_autocast(x):
            x_TD = (x if x.dtype == dtype else x.to(dtype)).reshape(-1, x.shape[-1])
            losses = self.context.losses if self.training else None
            if self._is_joined and losses is None and not self.context.hooked:
                y_TO = self.experts(of_base(self.base, x_TD), x_TD)
            else:
                y_TO = self._routed_apart(x_TD, self.siblings.shared_input(x, self.dropout_key), losses)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _routed_apart(self, x_TD: Tensor, shared: SharedInput, losses: ContrastiveLosses | None) -> Tensor:
        """(T, O), where the router decides first."""
        gate_TE = with_shared(self.router(x_TD), self._num_shared)
        drops, tokens_TD = self.training and self.dropout > 0.0, x_TD
        if drops or self._is_partitioned:  # made of the input itself, for all layers that read it
            tokens_TD = shared.once("dropped", lambda: self._tokens(x_TD, shared.dropout_key, drops))
        attachment = losses.of_layer(self.name, tokens_TD, gate_TE, self.context.tokens) if losses else None
        if self._is_partitioned:
            return self._with_others(x_TD, gate_TE, tokens_TD, shared, attachment)
        base_TO, experts = self._base(x_TD, gate_TE)
        return experts(base_TO, tokens_TD, gate_TE, attachment=attachment)

    def _with_others(
        self,
        x_TD: Tensor,
        gate_TE: Tensor,
        tokens_TD: Tensor,
        shared: SharedInput,
        attachment: ContrastOfTokens | None,
    ) -> Tensor:
        """(T, O) where experts lie on other ranks: the base layer computes while the longer trip is under way.

        That is the tokens' for the layer that sends them, and the sums' for those that find them there.
        """
        assert self.context.exchange is not None, "partitioned experts need an exchange"
        decided = self.router.gates.once if isinstance(self.router, BlockRouter) else Once()
        visit = self.context.exchange.depart(shared.once, decided, tokens_TD, gate_TE, features(self.base)[1])
        if visit.have_left and self.experts.rows is None:
            sums = visit.through(partial(self.experts, None, attachment=attachment))
            return of_base(self.base, x_TD) + sums()
        base_TO, experts = self._base(x_TD, gate_TE)
        return base_TO + visit.through(partial(experts, None, attachment=attachment))()

    def __getattr__(self, name: str) -> Any:
        """Refuse to hand out the base's weight: to compute with it leaves the experts out, and nobody would notice."""
        if name in ("weight", "bias"):
            raise WeightReadPast(
                f"adapter.target_modules names {self.name}, but the model reads its {name} itself instead of calling "
                "the layer, which would leave the experts out. Take this layer out of adapter.target_modules "
                "(or adapter.lora_modules)."
            )
        return super().__getattr__(name)

    def _base(self, x_TD: Tensor, gate_TE: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        """(T, O) of the base, as the experts see it, and the experts that go with it."""
        if self.experts.rows is None:
            return of_base(self.base, x_TD), self.experts
        exchange = self.context.exchange if self._is_partitioned else None
        of_all = exchange.of_all_experts if exchange else lambda ratio_LO: ratio_LO
        base_TO, ratio_LO = self.experts.rows(self.base, x_TD, gate_TE, of_all)
        return base_TO, partial(self.experts, ratio_LO=ratio_LO)

    def _tokens(self, x_TD: Tensor, dropout_key: int, drops: bool) -> Tensor:
        """(T, D): what the experts see of the input."""
        if not drops:
            return x_TD
        keys_BS = self.context.tokens.keys_BS
        if keys_BS is None:
            return nn.functional.dropout(x_TD, self.dropout)
        return keyed_dropout(x_TD, keys_BS.reshape(-1), dropout_key, self.dropout)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, RoutedLinear]]:
    """Name and module of every adapted layer, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            yield name, module


def adapter_context(model: nn.Module) -> AdapterContext:
    """The context that all adapted layers of the model share."""
    _, layer = next(adapted_layers(model))
    return layer.context
