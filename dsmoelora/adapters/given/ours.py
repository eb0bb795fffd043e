"""An adapter folder of ours, as experts to start from."""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsmoelora.adapters.folder_files import (
    CONFIG_FILE,
    START_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_adapter_config,
)
from dsmoelora.adapters.given.experts import GivenExperts, GivenFolder, GivenLayer, shapes_in, tensors_in
from dsmoelora.adapters.routers.given import constant_gates
from dsmoelora.adapters.starts.svd import StartFactors, start_names
from dsmoelora.adapters.targets import layer_config
from dsmoelora.config import AdapterConfig
from dsmoelora.config.adapter_options import EXPERTS
from dsmoelora.errors import CheckpointError, bad_value, listing


def open_ours(path: Path, key: str) -> GivenFolder:
    """Look at the folder's configuration and at the headers of its files.

    With `adapter.init: svd` or `loftq` its experts take along what was taken from the base, as in an export: their rank
    is R (1 + E).

    Args:
        path: of the folder
        key: that names it, for messages

    Raises:
        ConfigError: its experts are of a kind that two factors cannot hold
        CheckpointError: it is damaged
    """
    description = read_adapter_config(path)
    config, layers = adapter_config(description), description["layers"]
    if config.expert == "dora":
        raise bad_value(
            key,
            str(path),
            "an adapter of two factors, and this one rescales the rows of the weight (adapter.expert: dora)",
            "Take adapters with adapter.expert lora or moslora.",
        )
    if config.style == "decoder_layer":
        allowed = "an adapter whose experts are of one layer each, and its are the modules of decoder layers (MiLoRA)"
        raise bad_value(key, str(path), allowed, "Make one of it first: launch/export.py --format average --data.")
    if config.shared_experts:
        allowed = "an adapter whose experts all have a gate, and this one has shared experts (adapter.shared_experts)"
        raise bad_value(key, str(path), allowed, "Make one of it first: launch/export.py --format average --data.")
    shapes = shapes_in(path / WEIGHTS_FILE)
    found = {name: _layer(name, layer_config(config, name), shapes, path) for name in layers}
    if config.shifts_base:
        started = shapes_in(path / START_FILE)
        wrong = [name for layer in layers for name in start_names(layer) if started.get(name) != shapes[name]]
        if wrong:
            raise _damaged(path, wrong)
        more = {name: layer.rank * (1 + layer.num_experts) for name, layer in found.items()}
        found = {
            name: GivenLayer(layer.num_experts, layer.in_features, layer.out_features, more[name], layer.scale)
            for name, layer in found.items()
        }
    plain = frozenset(name for name, layer in found.items() if layer.num_experts < config.num_experts)
    routers = {name: shape for name, shape in shapes.items() if ".router." in name}
    read, base = partial(_read, path, config, found), description["base_fingerprint"]
    router = (config.router, config.router_start) if config.num_experts > 1 else None
    gates = partial(same_gates, path, config, frozenset(routers)) if config.router == "constant" else None
    base_model = description["base_model_name_or_path"]
    return GivenFolder(path, base_model, config.num_experts, found, read, base, plain, routers, router, gates)


def _layer(name: str, config: AdapterConfig, shapes: dict[str, tuple[int, ...]], path: Path) -> GivenLayer:
    own = [f"{name}.experts.{part}" for part in EXPERTS[config.expert].parameters]
    num_experts, rank = config.num_experts, config.r
    wrong = [part for part in own if len(shapes.get(part, ())) != 3]
    wrong = wrong or [part for part in own if (shapes[part][0], shapes[part][2]) != (num_experts, rank)]
    if wrong:
        raise _damaged(path, wrong)
    a_name, b_name, *_ = own
    return GivenLayer(num_experts, shapes[a_name][1], shapes[b_name][1], rank, config.scale)


def _damaged(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(f"{path} does not fit its {CONFIG_FILE}: {listing(names)}. Copy the adapter folder again.")


def _read(path: Path, config: AdapterConfig, layers: dict[str, GivenLayer], layer: str, experts: range) -> GivenExperts:
    names = [f"{layer}.experts.{part}" for part in EXPERTS[config.expert].parameters]
    is_single = layers[layer].num_experts == 1
    found = tensors_in(path / WEIGHTS_FILE, names, slice(0, 1) if is_single else slice(experts.start, experts.stop))
    own = GivenExperts(*found)
    if config.shifts_base:
        own = _with_shift(own, StartFactors(*tensors_in(path / START_FILE, list(start_names(layer)))))
    return _repeated(own, len(experts)) if is_single else own


def same_gates(path: Path, config: AdapterConfig, names: Container[str], layer: str) -> Tensor:
    """(E,) fp64 of a layer with the router `constant`, its own or its block's; 1 for the one expert of a plain layer.

    Args:
        path: of the folder
        config: of the adapter
        names: of its tensors
        layer: name of the layer
    """
    routers = [f"{place}.router.weight" for place in (layer, layer.rpartition(".")[0])]
    name = next((name for name in routers if name in names), None)
    if layer_config(config, layer).num_experts == 1 or name is None:
        return torch.ones(1, dtype=torch.float64)
    assert config.router_start is not None, "the router has this option"
    return constant_gates(tensors_in(path / WEIGHTS_FILE, [name])[0], config.router_start)


def _with_shift(own: GivenExperts, start: StartFactors) -> GivenExperts:
    """Each expert with the shift of the base that it was trained on: exact wherever gates sum to 1."""
    a_DF, b_OF = start.shift()

    def joined(factor_EXR: Tensor, shift_XF: Tensor) -> Tensor:
        return torch.cat((factor_EXR, shift_XF.expand(len(factor_EXR), -1, -1)), -1)

    return GivenExperts(joined(own.a_EDR, a_DF), joined(own.b_EOR, -b_OF))


def _repeated(own: GivenExperts, count: int) -> GivenExperts:
    tensors = (own.a_EDR, own.b_EOR, own.m_ERR)
    return GivenExperts(*(None if one is None else one.expand(count, -1, -1) for one in tensors))  # type: ignore[arg-type]
