"""`adapter.freeze`: which roles may stay as they start, and what the optimizer has no use for then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from dsmoelora.config.adapter_options import EXPERTS, ROUTERS, ExpertName, RouterName
from dsmoelora.config.checks import require, require_unset
from dsmoelora.config.optim import OptimConfig

Role = Literal["a", "b", "m", "magnitude", "router"]
_KEY = "adapter.freeze"


class FreezeSettings(Protocol):
    """The part of `AdapterConfig` that is looked at here."""

    num_experts: int
    expert: ExpertName
    router: RouterName
    init: Literal["kaiming", "gaussian", "svd", "gradient", "loftq"]
    experts_from: list[str]
    freeze: list[Role]


def check_freeze(config: FreezeSettings) -> None:
    """Refuse roles that the adapter does not have, and those without which nothing could be learned.

    Raises:
        ConfigError: naming the role and the reason
    """
    frozen = config.freeze
    has_router = config.num_experts > 1 and ROUTERS[config.router].is_trained
    roles = [*EXPERTS[config.expert].parameters, *(["router"] if has_router else [])]
    for role in frozen:
        allowed = f"a list of some of {', '.join(roles)} (adapter.expert {config.expert}, {config.num_experts} experts)"
        require(role in roles, _KEY, frozen, allowed, f"Take {role} out.")
    require(
        set(frozen) != set(roles), _KEY, frozen, f"fewer than all of {', '.join(roles)}", "Leave one to be trained."
    )
    if "b" in frozen and config.init in ("kaiming", "gaussian"):
        allowed, remedy = (
            "without b where adapter.experts_from is empty: it starts at 0",
            "Name adapters.",
        )
        require(bool(config.experts_from), _KEY, frozen, allowed, remedy)
    if config.init not in ("kaiming", "gaussian"):
        of_training = "their start is one of training"
        why = of_training if config.init == "gradient" else "the base is shifted by the start of both"
        allowed = f"without a and b where adapter.init is {config.init}: {why}"
        require(not {"a", "b"} & set(frozen), _KEY, frozen, allowed, "Take another adapter.init.")
    if config.router == "sigmoid_bias":
        allowed = "without router where adapter.router is sigmoid_bias, whose bias moves"
        require("router" not in frozen, _KEY, frozen, allowed, "Take another router.")


def check_losses_of_frozen(config: FreezeSettings, losses: Mapping[str, float]) -> None:
    """Refuse losses of the experts' outputs where what makes these is frozen.

    Raises:
        ConfigError: naming the loss
    """
    stays = set(EXPERTS[config.expert].parameters) <= set(config.freeze)
    for name, weight in losses.items():
        ok = not weight or not name.startswith("contrastive") or not stays
        allowed = f"0 where adapter.freeze is {config.freeze}, for the outputs that it tells apart stay as they are"
        require(ok, f"losses.{name}", weight, allowed, "Drop one of the two.")


def check_optim_of_frozen(config: FreezeSettings, optim: OptimConfig) -> None:
    """Refuse settings of the optimizer for what is frozen, and preconditioners that would lack a factor.

    Raises:
        ConfigError: naming the setting
    """
    frozen = set(config.freeze)
    if "b" in frozen:
        require_unset("optim", optim, "where adapter.freeze has b", "lr_b_ratio")
    if "router" in frozen:
        require_unset("optim", optim, "where adapter.freeze has router", "lr_router", "max_grad_norm_router")
    if optim.preconditioner == "none" or not frozen & {"a", "b", "m"}:
        return
    has_pair = config.expert != "moslora" and not {"a", "b"} <= frozen
    allowed = f"none where adapter.freeze is {config.freeze}" + (", or scaled" if has_pair else "")
    remedy = "`scaled` is the rule where one factor is frozen." if has_pair else "There is no pair a, b to work on."
    ok = has_pair and optim.preconditioner == "scaled"
    require(ok, "optim.preconditioner", optim.preconditioner, allowed, remedy)
