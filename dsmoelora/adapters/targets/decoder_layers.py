"""Which decoder layer each target module lies in, for adapters whose experts are the modules of a decoder layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from dsmoelora.adapters.targets.names import LORA, TARGETS
from dsmoelora.errors import ModelError, bad_value, listing

_WHERE = "where adapter.style is decoder_layer"


def decoder_layers_of(model: nn.Module, names: Sequence[str], num_experts: int) -> dict[str, str]:
    """Name of the decoder layer of each of these layers.

    A decoder layer is an element of the outermost list of modules that the layer lies in.

    Args:
        model: of transformers, or built like one
        names: of the target modules, in the order of the model
        num_experts: E, how many of them each decoder layer must have

    Raises:
        ConfigError: a layer lies in none, or a decoder layer has another number of them
        ModelError: a decoder layer has a router of its own
    """
    found = {name: decoder_layer_of(model, name) for name in names}
    outside = [name for name, layer in found.items() if not layer]
    if outside:
        allowed = f"linear layers of decoder layers {_WHERE}"
        raise bad_value(TARGETS, listing(outside, limit=4), allowed, f"Name the others in {LORA} (plain LoRA).")
    counts = Counter(found.values())
    odd = next((layer for layer, count in counts.items() if count != num_experts), None)
    if odd is not None:
        own = [name.removeprefix(f"{odd}.") for name, layer in found.items() if layer == odd]
        allowed = f"the number of target modules of each decoder layer {_WHERE}: {odd} has {len(own)} ({listing(own)})"
        remedy = f"Set adapter.num_experts to {len(own)}, or name others in {TARGETS}; those that only some decoder "
        raise bad_value("adapter.num_experts", num_experts, allowed, f"{remedy}layers have go to {LORA}.")
    taken = [layer for layer in counts if hasattr(model.get_submodule(layer), "router")]
    if taken:
        raise ModelError(f"{taken[0]} has a router of its own, beside which adapter.style decoder_layer has no place.")
    return found


def hidden_size(model: nn.Module) -> int:
    """What decoder layers are called with: the width of a token's state."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError("adapter.style decoder_layer needs a model of transformers, whose config has hidden_size.")
    size: int = config.get_text_config().hidden_size
    return size


def decoder_layer_of(model: nn.Module, name: str) -> str:
    """Name of the element of the outermost list of modules that a layer lies in; empty where it lies in none."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return ""
