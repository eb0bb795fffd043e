"""Which layers of a base are kept in 4 bits, and how they become so while the base is built and loaded.

Nowhere is a whole 16-bit model: each weight is packed when it comes from its file. Layers are told apart by the order
in which a model makes them, which is found on a model without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dsmoelora.adapters.four_bit import BLOCK, FrozenLinear4bit, check_installed, num_packed, packed_layers
from dsmoelora.adapters.targets.names import ALL_LINEAR, match_targets
from dsmoelora.errors import ModelError, listing

Model = TypeVar("Model", bound=nn.Module)


def build_recorded(build: Callable[[], Model]) -> tuple[Model, frozenset[int]]:
    """A model without weights, and which of the linear layers it makes are to be packed, counted as they are made.

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
    chosen = {id(model.get_submodule(name)) for name in layers_to_pack(model)}
    return model, frozenset(place for place, module in enumerate(made) if id(module) in chosen)


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


@contextmanager
def packing_weights(chosen: frozenset[int], dtype: torch.dtype, is_partitioned: bool) -> Iterator[None]:
    """Inside the block the chosen layers of the model that is built there are packed, as their weights come.

    Args:
        chosen: of `build_recorded`
        dtype: of the model
        is_partitioned: the model is built under ZeRO-3, whose parameters have their sizes from the beginning; otherwise
            it is built on the meta device, and each weight is put into its place when it was read
    """
    check_installed()
    num_made = 0

    def made(module: Any, parameter: nn.Parameter) -> nn.Parameter | None:
        nonlocal num_made
        num_made += 1
        if num_made - 1 not in chosen:
            return None
        module.__class__ = FrozenLinear4bit
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


def check_packed(model: nn.Module, chosen: frozenset[int]) -> None:
    """After loading: all chosen layers are packed, and were numbers.

    Raises:
        ModelError: some are not
    """
    layers = packed_layers(model)
    assert len(layers) == len(chosen), f"{len(layers)} layers were packed, not {len(chosen)}"
    wrong = [name for name, layer in layers.items() if not layer.was_finite]
    if wrong:
        raise ModelError(f"The base model has {listing(wrong, 4)} with numbers that are not finite. Copy it again.")


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
