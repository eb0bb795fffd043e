"""Which layers of a base are kept in 4 bits, and how they become so while the base is built and loaded.

Nowhere is a whole 16-bit model: each weight is packed when it comes from its file. Layers are told apart by the order
in which a model makes them, which is found on a model without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from dsmoelora.adapters.four_bit import (
    BLOCK,
    FrozenLinear4bit,
    Preparation,
    check_installed,
    num_packed,
    packed_layers,
)
from dsmoelora.adapters.starts.loftq import LoftqSearch
from dsmoelora.adapters.starts.svd import check_num_singular
from dsmoelora.adapters.targets.names import ALL_LINEAR, LORA, TARGETS, adapted_names, layer_config, match_targets
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ModelError, bad_value, listing


def places_to_pack(build: Callable[[], nn.Module]) -> dict[int, str]:
    """Which of the linear layers that a model makes are to be packed, counted as they are made, with their names.

    Those are the layers that `all-linear` means: neither the output head nor what the base routes tokens with, nor the
    part of a model that sees or hears.

    Raises:
        ModelError: there is none, or one whose size cannot be packed
    """
    made: list[nn.Module] = []

    def note(module: nn.Module, _: nn.Parameter) -> None:
        made.append(module)

    with _noticing(note):
        model = build()
    chosen = {id(model.get_submodule(name)): name for name in layers_to_pack(model)}
    return {place: chosen[id(module)] for place, module in enumerate(made) if id(module) in chosen}


def layers_to_pack(model: nn.Module) -> list[str]:
    """Names of the layers that are packed.

    Raises:
        ModelError: there is none, or one whose size cannot be packed
    """
    layers = {name: model.get_submodule(name) for name in match_targets(model, ALL_LINEAR)}
    sizes = {name: one.in_features * one.out_features for name, one in layers.items() if type(one) is nn.Linear}
    if not sizes:
        raise ModelError("model.quantize is nf4, but the model has no nn.Linear to pack. Set it to none.")
    odd = [name for name, size in sizes.items() if size % BLOCK]
    if odd:
        raise ModelError(
            f"model.quantize is nf4, which packs {BLOCK} weights at a time, but the size of {listing(odd, 4)} is no "
            f"multiple of {BLOCK}. Set it to none."
        )
    return list(sizes)


def loftq_searches(
    model: nn.Module, config: AdapterConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, LoftqSearch]:
    """With `adapter.init: loftq`, by the name of each adapted layer what finds its start while its weight is read.

    Args:
        model: without weights
        config: of the adapter
        dtype: of the factors
        device: where to compute

    Raises:
        ConfigError: a layer cannot start so
    """
    if config.init != "loftq":
        return {}
    routed, plain = adapted_names(model, config)
    packed = set(layers_to_pack(model))
    apart = [name for name in (*routed, *plain) if name not in packed]
    if apart:
        allowed = f"another one where layers stay in 16 bits, as {listing(apart, 4)}: nothing is lost there"
        remedy = f"Take them out of {TARGETS} (or {LORA}), or set kaiming."
        raise bad_value("adapter.init", config.init, allowed, remedy)
    own = {name: layer_config(config, name) for name in (*routed, *plain)}
    for name, one in own.items():
        check_num_singular(one, name, cast(nn.Linear, model.get_submodule(name)))
    return {name: LoftqSearch(one, dtype, device) for name, one in own.items()}


def pack_on_meta(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model without weights the layers and the sizes of one that is packed.

    Raises:
        ModelError: there is no layer to pack, or one whose size cannot be packed
    """
    for name in layers_to_pack(model):
        layer: Any = model.get_submodule(name)
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear4bit
            size = num_packed((layer.out_features, layer.in_features), dtype)
            numbers = torch.empty(size, dtype=dtype, device="meta")
            layer.weight = nn.Parameter(numbers, requires_grad=False)


@contextmanager
def packing_weights(
    chosen: Mapping[int, str],
    dtype: torch.dtype,
    is_partitioned: bool,
    prepare: Mapping[str, Preparation] = MappingProxyType({}),
) -> Iterator[None]:
    """Inside the block the chosen layers of the model that is built there are packed, as their weights come.

    Args:
        chosen: of `places_to_pack`
        dtype: of the model
        is_partitioned: the model is built under ZeRO-3, whose parameters have their sizes from the beginning; otherwise
            it is built on the meta device, and each weight is put into its place when it was read
        prepare: what is done to the weights of layers of these names before they are packed
    """
    check_installed()
    num_made = 0

    def made(module: Any, parameter: nn.Parameter) -> nn.Parameter | None:
        nonlocal num_made
        num_made += 1
        if num_made - 1 not in chosen:
            return None
        module.__class__ = FrozenLinear4bit
        module.prepare = prepare.get(chosen[num_made - 1])
        if not is_partitioned:
            return None
        numbers = torch.empty(num_packed(module.shape, dtype), dtype=dtype, device=parameter.device)
        return nn.Parameter(numbers, requires_grad=False)

    def came(module: nn.Module, parameter: nn.Parameter) -> nn.Parameter | None:
        if not isinstance(module, FrozenLinear4bit) or parameter.dim() == 1 or parameter.is_meta:
            return None
        flat = nn.Parameter(module.pack(parameter.detach().to(dtype), dtype), requires_grad=False)
        flat._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps transformers' random start off it
        return flat

    with _noticing(made, came):
        yield


def check_packed(model: nn.Module, chosen: Mapping[int, str]) -> None:
    """After loading: all chosen layers are packed, were numbers, and have given experts the start they wanted.

    Raises:
        ModelError: some are not
    """
    layers = packed_layers(model)
    assert len(layers) == len(chosen), f"{len(layers)} layers were packed, not {len(chosen)}"
    wrong = [name for name, layer in layers.items() if not layer.was_finite]
    if wrong:
        raise ModelError(f"The base model has {listing(wrong, 4)} with numbers that are not finite. Copy it again.")
    for name, layer in layers.items():
        if isinstance(layer.prepare, LoftqSearch) and layer.prepare.problem:
            raise ModelError(
                f"adapter.init is 'loftq', but what 4 bits lose of {name} has no singular value decomposition: "
                f"{layer.prepare.problem}. Set adapter.init to kaiming."
            )


@contextmanager
def _noticing(
    made: Callable[[nn.Module, nn.Parameter], nn.Parameter | None],
    came: Callable[[nn.Module, nn.Parameter], nn.Parameter | None] = lambda *_: None,
) -> Iterator[None]:
    """Inside the block `made` hears of each linear layer's first weight, `came` of those to follow.

    What they give back takes its place.
    """

    def notice(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if name != "weight" or parameter is None or not isinstance(module, nn.Linear):
            return None
        is_first = module._parameters.get("weight") is None
        if is_first and type(module) is nn.Linear:
            return made(module, parameter)
        return None if is_first else came(module, parameter)

    register: Any = nn.modules.module.register_module_parameter_registration_hook  # its type lets no hook give back
    hook = register(notice)
    try:
        yield
    finally:
        hook.remove()
