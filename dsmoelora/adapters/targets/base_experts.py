"""Finds the routed experts and routers of a base model that is a mixture of experts itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from dsmoelora.adapters.targets.linear import features, is_linear

_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class BaseExperts:
    """What a base model that is a mixture of experts itself keeps for itself.

    Args:
        containers: names of the modules that hold the routed experts of a layer
        linears: routed experts that are linear layers (most bases hold theirs in one parameter of three dims)
        gates: linear layers that weigh or choose experts: routers, gates of shared experts
    """

    containers: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)


def base_experts(model: nn.Module) -> BaseExperts:
    """Routed experts and routers of the base, told by how the model is built.

    Under ZeRO-3 parameters have no shape, so only modules and their fields count. A layer's routed experts lie in the
    topmost module called after experts that is a list, or that has parameters but no linear layer (a shared expert
    is a module with linear layers, or is called so).
    """
    found, counts = BaseExperts(), _expert_counts(model)
    for name, module in model.named_modules():
        inside = any(name.startswith(container + ".") for container in found.containers)
        if inside or not _holds_routed_experts(name, module):
            continue
        found.containers.append(name)
        found.linears += [f"{name}.{below}" for below, layer in module.named_modules() if is_linear(layer)]
        num_experts = counts | ({len(module)} if isinstance(module, _LISTS) else set())
        found.gates += _gates_beside(model, name, num_experts)
    return found


def _gates_beside(model: nn.Module, experts: str, num_experts: set[int]) -> list[str]:
    """The linear layers that weigh or choose experts.

    Each is alone in a module beside the experts, and that module is called router, or the layer has one output (the
    gate of a shared expert) or as many as there are experts.
    """
    parent, gates = experts.rpartition(".")[0], []
    for child_name, child in model.get_submodule(parent).named_children():
        place = f"{parent}.{child_name}".lstrip(".")
        linears = [(below, layer) for below, layer in child.named_modules() if is_linear(layer)]
        if place == experts or len(linears) != 1:
            continue
        below, layer = linears[0]
        if features(layer)[1] in {1, *num_experts} or "router" in _called(place, child):
            gates.append(f"{place}.{below}".rstrip("."))
    return gates


def _holds_routed_experts(name: str, module: nn.Module) -> bool:
    called = _called(name, module)
    if "expert" not in called or "router" in called or "shared" in called:
        return False
    has_linears = any(is_linear(layer) for layer in module.modules())
    has_parameters = next(module.parameters(), None) is not None
    return has_parameters and (isinstance(module, _LISTS) or not has_linears)


def _called(name: str, module: nn.Module) -> str:
    return f"{name.rpartition('.')[2]} {type(module).__name__}".lower()


def _expert_counts(model: nn.Module) -> set[int]:
    """Whatever the model's configuration counts in experts."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    described = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {count for key, count in vars(described).items() if "expert" in key and type(count) is int}
