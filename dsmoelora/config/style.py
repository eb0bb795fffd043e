"""`adapter.style`: how many layers a router serves, and what goes with it."""

from __future__ import annotations

from typing import Literal, Protocol

from dsmoelora.config.adapter_options import RouterName, Style
from dsmoelora.config.checks import require


class StyleSettings(Protocol):
    """The part of `AdapterConfig` that is looked at here."""

    style: Style
    num_experts: int
    shared_experts: int
    router: RouterName
    init: Literal["kaiming", "gaussian", "svd", "gradient", "loftq"]
    experts_from: list[str]

    @property
    def shifts_base(self) -> bool:
        """Whether the base goes without what the experts start from."""


def check_style(config: StyleSettings) -> None:
    """Refuse what a router of several layers cannot do.

    Raises:
        ConfigError: naming the setting and the reason
    """
    style, one = config.style, config.num_experts == 1
    allowed = "per_linear with adapter.router = arrow, which looks at the experts of one layer"
    require(config.router != "arrow" or style == "per_linear", "adapter.style", style, allowed, "Drop it.")
    remedy = "Drop adapter.style: one expert needs no router."
    allowed = f"2 or more where adapter.style is {style}"
    require(not one or style == "per_linear", "adapter.num_experts", 1, allowed, remedy)
    if style != "decoder_layer":
        return
    remedy, where = "Drop it, or adapter.style.", "with adapter.style = decoder_layer"
    allowed = f"prompt {where}, which chooses among the target modules once for a prompt"
    require(config.router == "prompt", "adapter.router", config.router, allowed, "Set adapter.router to prompt.")
    allowed = f"0 {where}, whose experts are the target modules: name the others in adapter.lora_modules"
    require(not config.shared_experts, "adapter.shared_experts", config.shared_experts, allowed, remedy)
    allowed = f"kaiming, gaussian or gradient {where}, whose gates do not sum to 1 in any layer"
    require(not config.shifts_base, "adapter.init", config.init, allowed, remedy)
    allowed = f"empty {where}, for adapters that were trained apart are experts of the same layers"
    require(not config.experts_from, "adapter.experts_from", config.experts_from, allowed, remedy)
