"""Experts that start from the adapters of `adapter.experts_from`.

    folder f, expert e   ->   expert (experts of the folders before) + e
    rank r < R, columns of 0 in both factors
                         ->   a: columns of the seed's random start (0 where a is frozen), b: columns of 0
    scale s_f != s       ->   b s_f / s
    mixer                ->   folded into b; kept where adapter.expert is moslora
    a layer it lacks     ->   b = 0

Every expert computes what it computed where it came from, for a gate of 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.bank import ExpertBank
from dsmoelora.adapters.fingerprint import difference, fingerprint
from dsmoelora.adapters.folder_files import WEIGHTS_FILE
from dsmoelora.adapters.given.experts import tensors_in
from dsmoelora.adapters.given.folders import KEY, GivenFolder, GivenLayer, open_folders
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routers.given import ArrowRouter, prototypes
from dsmoelora.adapters.targets import layer_config
from dsmoelora.adapters.targets.linear import features, is_linear
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import CheckpointError, bad_value, listing

logger = logging.getLogger(__name__)


def start_from_folders(model: nn.Module, config: AdapterConfig) -> Callable[[nn.Module], None]:
    """What fills the experts of a whole model from `adapter.experts_from`, to be called when it is adapted.

    Args:
        model: not adapted yet
        config: of the adapter
    """
    return partial(take_experts, config=config, base=fingerprint(model.named_parameters()))


def check_given(model: nn.Module, config: AdapterConfig, names: Sequence[str]) -> None:
    """Whether the folders fit the configuration and the model; looks at headers and shapes alone.

    Args:
        model: not adapted yet
        config: of the adapter
        names: of the layers that will be adapted

    Raises:
        ConfigError: a setting contradicts the folders
        CheckpointError: a folder is damaged, or belongs to another base model
    """
    folders = open_folders(config.experts_from, config.split_ranks)
    wanted = {
        "num_experts": (sum(folder.num_experts for folder in folders), "the number of experts"),
        "r": (max(folder.rank for folder in folders), "the largest rank"),
    }
    for name, (value, what) in wanted.items():
        found = getattr(config, name)
        if found != value:
            raise bad_value(f"adapter.{name}", found, f"{value}, {what} in the folders of {KEY}", f"Set it to {value}.")
    modules = dict(model.named_modules())
    for folder in folders:
        _check_layers(modules, folder)
        left_out = [name for name in folder.layers if name not in names]
        if left_out:
            raise bad_value(
                "adapter.target_modules",
                config.target_modules,
                f"such that it names all layers of {folder.path}, and it leaves out {listing(left_out, 4)}",
                "Add them, or drop adapter.target_modules on the command line and in the recipe.",
            )
        odd = [name for name in folder.layers if not _fits(layer_config(config, name), folder, name)]
        if odd:
            raise bad_value(
                "adapter.lora_modules",
                config.lora_modules,
                f"of layers that have one expert in one folder, and {folder.path} brings others to {listing(odd, 4)}",
                "Name these in adapter.target_modules.",
            )


def _check_layers(modules: Mapping[str, nn.Module], folder: GivenFolder) -> None:
    for name, layer in folder.layers.items():
        module = modules.get(name)
        found = features(module) if is_linear(module) else None
        wanted = (layer.in_features, layer.out_features)
        if found != wanted:
            has = "no such linear layer" if found is None else f"one of {found[0]} in- and {found[1]} out-features"
            raise CheckpointError(
                f"{folder.path} ({KEY}) adapts a layer {name} of {wanted[0]} in- and {wanted[1]} out-features, and the "
                f"model has {has}. It belongs to the base model {folder.base_model!r}; set model.path to that, or take "
                "another adapter."
            )


def _fits(config: AdapterConfig, folder: GivenFolder, name: str) -> bool:
    """A plain layer takes the expert of one folder's plain layer; one with a router takes all experts of all."""
    if config.num_experts > 1 or len(config.experts_from) > 1:
        return config.num_experts > 1
    return folder.layers[name].num_experts == 1


@torch.no_grad()
def take_experts(
    model: nn.Module, config: AdapterConfig, base: Mapping[str, Any], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Fill the experts that lie here, layer by layer, each read when its turn comes.

    With one folder, routers of its kind start from it too where they keep the same tensors. Router `arrow` gets the
    directions of the experts of all ranks.

    Args:
        model: adapted, with the layers and experts that `check_given` has looked at
        config: of the adapter
        base: fingerprint of the base model
        on_progress: called for every layer

    Raises:
        CheckpointError: a folder is damaged, or was trained on another base model
    """
    folders = open_folders(config.experts_from, config.split_ranks)
    for folder in folders:
        what = None if folder.base is None else difference(folder.base, base)
        if what is not None:
            raise CheckpointError(
                f"{folder.path} ({KEY}) was trained on another base model: {what}. Set model.path to "
                f"{folder.base_model!r}, or take another adapter."
            )
    for name, layer in adapted_layers(model):
        if isinstance(layer.router, ArrowRouter):
            layer.router.weight.copy_(torch.cat([_directions(folder, name, layer.router) for folder in folders]))
        on_progress()
        first = 0
        for folder in folders:
            if name in folder.layers:
                _fill(layer.experts, folder, name, first, "a" in config.frozen)
            first += folder.num_experts
    if len(folders) == 1 and _is_alike(config, folders[0]):
        _take_routers(model, folders[0])


def _directions(folder: GivenFolder, name: str, router: ArrowRouter) -> Tensor:
    """(E, D) of a folder's experts; 0 where it lacks the layer."""
    if name not in folder.layers:
        return router.weight.new_zeros(folder.num_experts, router.weight.shape[-1])
    found = folder.read(name, range(folder.num_experts)).without_mixer()
    return prototypes(found.a_EDR, found.b_EOR).to(router.weight)


def _fill(bank: ExpertBank, folder: GivenFolder, name: str, first: int, a_is_frozen: bool) -> None:
    """Fill the experts of a bank that are the folder's, which begin at number `first`."""
    given, count = folder.layers[name], folder.num_experts if bank.shapes["a"][0] > 1 else 1
    here = range(max(bank.held.start, first), min(bank.held.stop, first + count))
    if not here:
        return
    found = folder.read(name, range(here.start - first, here.stop - first))
    rows = slice(here.start - bank.held.start, here.stop - bank.held.start)
    if bank.m is None:
        found = found.without_mixer()
    else:
        mixers = torch.eye(bank.m.shape[-1]).repeat(len(here), 1, 1)
        if found.m_ERR is not None:
            mixers[:, : given.rank, : given.rank] = found.m_ERR
        bank.m[rows].copy_(mixers)
    if a_is_frozen:
        bank.a[rows].zero_()
    bank.b[rows].zero_()
    start_LDR = bank.a[rows, :, : given.rank]
    is_padding_L1R = ~(found.a_EDR.any(1, keepdim=True) | found.b_EOR.any(1, keepdim=True)).to(start_LDR.device)
    start_LDR.copy_(torch.where(is_padding_L1R, start_LDR, found.a_EDR.to(start_LDR)))
    bank.b[rows, :, : given.rank].copy_(_rescaled(found.b_EOR, given, bank.scale))


def _rescaled(b_EOR: Tensor, given: GivenLayer, scale: float) -> Tensor:
    """As it is, to the last bit, where the scales agree."""
    return b_EOR if math.isclose(given.scale, scale, rel_tol=1e-9) else b_EOR.float() * (given.scale / scale)


def _is_alike(config: AdapterConfig, folder: GivenFolder) -> bool:
    """Whether the folder's routers make the same of the same tensors; all that learn and are linear in the token do."""
    if folder.router is None or "arrow" in (config.router, folder.router[0]):
        return False
    own = (config.router, config.router_start)
    return folder.router == own or "constant" not in (config.router, folder.router[0])


def _take_routers(model: nn.Module, folder: GivenFolder) -> None:
    kept = {f"{place}.router.{key}": tensor for place, router in routers(model) for key, tensor in _kept(router)}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    if not kept or shapes != folder.routers:
        return
    values = tensors_in(folder.path / WEIGHTS_FILE, list(kept))
    for tensor, value in zip(kept.values(), values, strict=True):
        tensor.copy_(value)
    logger.info("The routers start from %s too.", folder.path)


def _kept(router: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*router.named_parameters(), *router.named_buffers()]
