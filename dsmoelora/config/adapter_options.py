"""Every router and every kind of expert by name: which options they have, and what they cannot be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsmoelora.errors import bad_value, listing

RouterName = Literal[
    "softmax_topk", "softmax", "noisy_topk", "top_p", "threshold", "sigmoid_bias", "prompt", "constant", "arrow"
]
RouterStart = Literal["softmax", "mean", "sum"]
Pooling = Literal["mean", "last", "attention"]
Style = Literal["per_linear", "ffn_block", "decoder_layer"]
ExpertName = Literal["lora", "moslora", "dora"]
MixerInit = Literal["kaiming", "orthogonal"]


class AdapterSettings(Protocol):
    """The part of `AdapterConfig` that is looked at here."""

    num_experts: int
    shared_experts: int
    style: Style
    router: RouterName
    top_k: int | None
    top_k_warmup: int | None
    top_p: float | None
    bias_rate: float | None
    router_start: RouterStart | None
    router_temperature: float | None
    pooling: Pooling | None
    expert: ExpertName
    mixer_init: MixerInit | None

    @property
    def shifts_base(self) -> bool:
        """Whether the base goes without what the experts start from."""


@dataclass(frozen=True)
class Kind:
    """What the recipe must know of a router or an expert; their arithmetic is in `adapters/`.

    Args:
        options: keys of the section `adapter` that are its own
        parameters: of an expert, as the layer names them
        no_balance: why `losses.balance` does not go with a router; empty where it does
        uses_all: every token uses every expert
        is_trained: a router learns
    """

    options: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    no_balance: str = ""
    uses_all: bool = False
    is_trained: bool = True


_ALWAYS_EVEN = "every token uses every expert, so their shares of tokens are always equal"
_TOP_K = ("top_k", "top_k_warmup")
ROUTERS: dict[RouterName, Kind] = {
    "softmax_topk": Kind(_TOP_K),
    "softmax": Kind(no_balance=_ALWAYS_EVEN, uses_all=True),
    "noisy_topk": Kind(_TOP_K),
    "top_p": Kind(("top_p",)),
    "threshold": Kind(),
    "sigmoid_bias": Kind((*_TOP_K, "bias_rate"), no_balance="its selection bias balances the experts already"),
    "prompt": Kind((*_TOP_K, "pooling")),
    "constant": Kind(("router_start",), no_balance=_ALWAYS_EVEN, uses_all=True),
    "arrow": Kind(("top_k", "router_temperature"), no_balance="it learns nothing", is_trained=False),
}
EXPERTS: dict[ExpertName, Kind] = {
    "lora": Kind(parameters=("a", "b")),
    "moslora": Kind(("mixer_init",), parameters=("a", "b", "m")),
    "dora": Kind(parameters=("a", "b", "magnitude")),
}
_KINDS: dict[str, Mapping[Any, Kind]] = {"router": ROUTERS, "expert": EXPERTS}
_WHY_NOT_ONE = "only softmax_topk (plain LoRA) where adapter.num_experts is 1, for one expert needs no router"
# Where the chosen kind has the option, `null` means this.
_DEFAULTS = {
    "top_k_warmup": 0,
    "top_p": 0.8,
    "bias_rate": 1e-3,
    "mixer_init": "kaiming",
    "router_start": "mean",
    "router_temperature": 1.0,
    "pooling": "mean",
}


def settle_options(config: AdapterSettings) -> None:
    """Check the options of router and expert in an `AdapterConfig`, and fill in those that were left open.

    Raises:
        ConfigError: an option is out of range, belongs to another router or expert, or the router cannot work
    """
    if config.num_experts == 1 and config.router != "softmax_topk":
        raise bad_value("adapter.router", config.router, _WHY_NOT_ONE, "Drop it, or raise adapter.num_experts.")
    for what in _KINDS:
        _settle(config, what)
    _check_ranges(config)


def _settle(config: AdapterSettings, what: str) -> None:
    """The options of the chosen router, or of the chosen expert."""
    kinds, chosen = _KINDS[what], getattr(config, what)
    for option in dict.fromkeys(option for kind in kinds.values() for option in kind.options):
        value, own = getattr(config, option), option in kinds[chosen].options
        if own and value is None:
            default = max(1, config.num_experts // 2) if option == "top_k" else _DEFAULTS[option]
            if option == "router_start" and config.shifts_base:  # whose base is right for gates that sum to 1
                default = "softmax"
            setattr(config, option, default)
        elif not own and value is not None:
            raise bad_value(
                f"adapter.{option}",
                value,
                f"null with adapter.{what} = {chosen}, which does not use it",
                f"Drop it, or set adapter.{what} to one that does: "
                f"{listing(name for name, kind in kinds.items() if option in kind.options)}.",
            )


def _check_ranges(config: AdapterSettings) -> None:
    if config.top_k is not None and config.top_k < 1:
        raise bad_value("adapter.top_k", config.top_k, "1 or more", "Set adapter.top_k to a positive number.")
    if config.top_k is not None and config.top_k > config.num_experts:
        raise bad_value(
            "adapter.top_k",
            config.top_k,
            f"at most adapter.num_experts = {config.num_experts}",
            "Lower adapter.top_k or raise adapter.num_experts.",
        )
    if config.top_k_warmup:
        _check_warmup(config, config.top_k_warmup)
    if config.top_p is not None and not 0.0 < config.top_p < 1.0:
        remedy = "Try 0.8; for all experts take adapter.router = softmax."
        raise bad_value("adapter.top_p", config.top_p, "above 0 and below 1", remedy)
    if config.bias_rate is not None and config.bias_rate <= 0:
        raise bad_value("adapter.bias_rate", config.bias_rate, "above 0", "The usual value is 0.001.")
    if config.router_temperature is not None and config.router_temperature <= 0:
        raise bad_value("adapter.router_temperature", config.router_temperature, "above 0", "The usual value is 1.")
    if config.router == "sigmoid_bias" and config.top_k == config.num_experts:
        raise bad_value(
            "adapter.top_k",
            config.top_k,
            f"below adapter.num_experts = {config.num_experts}, for the bias of router sigmoid_bias only selects",
            "Lower adapter.top_k, or take adapter.router = softmax_topk.",
        )


def _check_warmup(config: AdapterSettings, steps: int) -> None:
    key = "adapter.top_k_warmup"
    if steps < 0:
        raise bad_value(key, steps, "0 or more", "0 switches it off.")
    if config.top_k == config.num_experts:
        allowed = f"0 where adapter.top_k is adapter.num_experts = {config.num_experts}, for K cannot fall"
        raise bad_value(key, steps, allowed, "Drop it, or lower adapter.top_k.")


def _check_loss(config: AdapterSettings, name: str, weight: float) -> None:
    """What a loss that is switched on wants of the experts, whatever their router."""
    key = f"losses.{name}"
    if config.num_experts == 1:
        raise bad_value(key, weight, "0 where adapter.num_experts is 1, for there are no routers", "Drop it.")
    if not name.startswith("contrastive"):
        return
    if config.style == "decoder_layer":
        why = "0 with adapter.style = decoder_layer, where a layer has one expert, whose outputs nothing is told from"
        raise bad_value(key, weight, why, "Drop it.")
    if config.shared_experts:
        why = "0 with adapter.shared_experts, for it tells the experts of a token from others, and these are of all"
        raise bad_value(key, weight, why, "Drop the loss, or the shared experts.")
    if config.top_k_warmup:
        why = "0 with adapter.top_k_warmup, for its memory grows with the square of a token's experts"
        raise bad_value(key, weight, why, "Drop one of the two.")


def check_losses(config: AdapterSettings, losses: Mapping[str, float]) -> None:
    """Refuse losses that the routers cannot have.

    Args:
        config: of the adapter
        losses: weights by name

    Raises:
        ConfigError: a loss that is switched on would do nothing
    """
    for name, weight in losses.items():
        if weight:
            _check_loss(config, name, weight)
    uses_all = ROUTERS[config.router].uses_all or config.top_k == config.num_experts
    reason = ROUTERS[config.router].no_balance
    if config.top_k == config.num_experts:
        reason = "adapter.top_k is adapter.num_experts, so the experts' shares of tokens are always equal"
    if losses["balance"] and reason:
        raise bad_value(
            "losses.balance", losses["balance"], f"0 with adapter.router = {config.router}: {reason}", "Drop it."
        )
    if losses["z"] and not ROUTERS[config.router].is_trained:
        raise bad_value("losses.z", losses["z"], f"0 with adapter.router = {config.router}: {reason}", "Drop it.")
    if losses["z"] and config.router_start in ("mean", "sum"):
        allowed = f"0 with adapter.router_start = {config.router_start}, whose logits are the gates"
        raise bad_value("losses.z", losses["z"], allowed, "Drop it, or take adapter.router_start = softmax.")
    coactive, allowed = losses["contrastive_coactive"], ""
    if uses_all:
        allowed = "0 where every token uses every expert, for there are no unselected experts to tell from"
    elif config.top_k == 1:
        allowed = "0 where adapter.top_k is 1, for no other expert is selected with an expert"
    if coactive and allowed:
        remedy = "Set adapter.top_k between the two, or take losses.contrastive."
        raise bad_value("losses.contrastive_coactive", coactive, allowed, remedy)
