"""Which modules of a model are feed-forward blocks, for adapters that route once a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn

from dsmoelora.adapters.targets import match_targets
from dsmoelora.adapters.targets.linear import Linear, features, is_linear
from dsmoelora.errors import ConfigError, bad_value, listing

# What a module is called with when tokens see one another in it.
_MIXES_TOKENS = ("mask", "position", "cache", "past")


def linears_of_block(module: nn.Module) -> list[Linear]:
    """The linear layers of a feed-forward block, the first of which reads the block's input; none for other modules.

    A feed-forward block holds two linear layers or more, one of which comes back to the width that the first starts
    from, and looks at each token by itself: it is not called with masks, positions or a cache, as attention is.
    """
    linears = [child for _, child in module.named_children() if is_linear(child)]
    if hasattr(module, "router") or not linears:
        return []
    width, _ = features(linears[0])
    if all(features(linear)[1] != width for linear in linears[1:]):
        return []
    names = inspect.signature(module.forward).parameters
    return [] if any(word in name for name in names for word in _MIXES_TOKENS) else linears


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name of the feed-forward block of each of these layers.

    Raises:
        ConfigError: a layer lies in none
    """
    names = list(names)
    outside = [name for name in names if not linears_of_block(model.get_submodule(_block(name)))]
    if outside:
        raise _lies_in_no_block(model, outside)
    return {name: _block(name) for name in names}


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _lies_in_no_block(model: nn.Module, outside: list[str]) -> ConfigError:
    inside = [
        name for name in match_targets(model, "all-linear") if linears_of_block(model.get_submodule(_block(name)))
    ]
    remedy = "The model has no such block: set adapter.style to per_linear."
    if inside:
        remedy = (
            f"Such layers are here: {listing(_last_two_parts(inside))}. Name the others in adapter.lora_modules (plain "
            "LoRA, without a router), or set adapter.style to per_linear."
        )
    return bad_value(
        "adapter.target_modules",
        listing(_last_two_parts(outside)),
        "linear layers of feed-forward blocks where adapter.style is ffn_block",
        remedy,
    )


def _last_two_parts(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in names})
