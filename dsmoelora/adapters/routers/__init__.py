"""Routers: which experts a token uses, and how much of each.

A router maps tokens (T, D) to gates (T, E) in fp32. Experts that it does not select have a gate of exactly 0 and get no
gradient. `shapes` has the shape of each of its parameters, which ZeRO-3 empties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dsmoelora.adapters.routers.base import RouterPlace, TopK
from dsmoelora.adapters.routers.bias import SigmoidBiasRouter
from dsmoelora.adapters.routers.given import ArrowRouter, ConstantRouter
from dsmoelora.adapters.routers.linear import LinearRouter, NoisyRouter, SingleExpertRouter, ThresholdRouter
from dsmoelora.adapters.routers.prompt import PromptRouter, unwatch_prompts, watch_prompts
from dsmoelora.adapters.routers.rules import SoftmaxRule, all_experts, top_p
from dsmoelora.config import AdapterConfig
from dsmoelora.config.adapter_options import RouterName

__all__ = ["BUILDERS", "RouterPlace", "build_router", "routers", "unwatch_prompts", "watch_prompts"]

# The options that a router reads are there: see `adapter_options`.
BUILDERS: dict[RouterName, Callable[[RouterPlace, Any], nn.Module]] = {
    "softmax_topk": lambda place, config: LinearRouter(place, SoftmaxRule(TopK(config.top_k, place.context))),
    "softmax": lambda place, config: LinearRouter(place, SoftmaxRule(all_experts)),
    "noisy_topk": lambda place, config: NoisyRouter(place, SoftmaxRule(TopK(config.top_k, place.context))),
    "top_p": lambda place, config: LinearRouter(place, SoftmaxRule(top_p(config.top_p))),
    "threshold": lambda place, config: ThresholdRouter(place),
    "sigmoid_bias": lambda place, config: SigmoidBiasRouter(place, config.top_k, config.bias_rate),
    "constant": lambda place, config: ConstantRouter(place, config.router_start),
    "arrow": lambda place, config: ArrowRouter(place, config.top_k, config.router_temperature),
    "prompt": lambda place, config: PromptRouter(place, SoftmaxRule(TopK(config.top_k, place.context)), config.pooling),
}


def build_router(place: RouterPlace, config: AdapterConfig) -> nn.Module:
    """The router of one layer."""
    return SingleExpertRouter() if place.num_experts == 1 else BUILDERS[config.router](place, config)


def routers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every router that has something to choose, and the name of the layer or block it stands in, in the model's order.

    Each has `shapes`: of its parameters by name, among them `weight`, whose first dim is E.
    """
    for name, module in model.named_modules():
        place, _, last = name.rpartition(".")
        if last == "router" and getattr(module, "shapes", None):
            yield place, module
