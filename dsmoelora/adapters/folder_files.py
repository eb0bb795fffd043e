"""The files of an adapter folder, and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsmoelora.config import AdapterConfig
from dsmoelora.errors import CheckpointError, listing

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
START_FILE = "start.safetensors"  # with `init: svd` and `loftq`: what experts have started from
TAKEN_FILE = "taken.safetensors"  # with `init: loftq`: what the base's weights went without when they were packed
PEFT_TYPE = "DSMOELORA"
_NEEDED_KEYS = ("layers", "base_fingerprint", "base_model_name_or_path")


def read_description(folder: Path) -> Any:
    """The content of `adapter_config.json`, of whatever kind of adapter.

    Raises:
        CheckpointError: missing or unreadable
    """
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no adapter folder: {path.name} cannot be read ({error.strerror}). "
            "Give the folder that training printed at its end (runs/<name>/adapter)."
        ) from error
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{path} is damaged: {error}. Copy the adapter folder again.") from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of the `adapter_config.json` of an adapter of ours.

    Raises:
        CheckpointError: missing, unreadable, or of another kind of adapter
    """
    path, description = folder / CONFIG_FILE, read_description(folder)
    if not isinstance(description, dict) or description.get("peft_type") != PEFT_TYPE:
        kind = description.get("peft_type") if isinstance(description, dict) else None
        raise CheckpointError(
            f"{path} has peft_type {kind!r}, but must have {PEFT_TYPE!r}. Load other adapters with the peft package."
        )
    missing = [key for key in _NEEDED_KEYS if key not in description]
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {listing(missing)}. Copy the adapter folder again.")
    return description


def adapter_config(description: Mapping[str, Any]) -> AdapterConfig:
    """The settings among what `read_adapter_config` gives.

    Raises:
        CheckpointError: some cannot be
    """
    known = {field.name for field in fields(AdapterConfig)}
    try:
        return AdapterConfig(**{key: value for key, value in description.items() if key in known})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} is damaged: {error}. Copy the adapter folder again.") from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Of each tensor by its name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: missing or damaged
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the adapter folder again.") from error


def read_start(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The start factors of an adapter, by the names of the factors; none where the base was not shifted by them.

    Args:
        folder: of the adapter
        config: of the adapter
        tensors: its weights, or some that have their names and shapes

    Raises:
        CheckpointError: missing, damaged, or of other shapes than the factors
    """
    if not config.shifts_base:
        return {}
    return _factors_of(folder / START_FILE, config, shapes_of(tensors), "what the base model was shifted by")


def read_taken(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """What was taken from the weights of the base before they were packed, by the names of the factors.

    Returns:
        the settings of the adapter, and the factors; none but with `init: loftq`

    Raises:
        CheckpointError: as `read_start`
    """
    config = adapter_config(read_adapter_config(folder))
    if config.init != "loftq":
        return config, {}
    shapes = shapes_of(read_weights(folder / WEIGHTS_FILE))
    what = "what was taken from the weights of the base model before they were packed into 4 bits"
    return config, _factors_of(folder / TAKEN_FILE, config, shapes, what)


def _factors_of(path: Path, config: AdapterConfig, shapes: Mapping[str, torch.Size], what: str) -> dict[str, Tensor]:
    """Factors `a` and `b` of all layers, of another time than those in the weights."""
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}, without which an adapter with adapter.init = {config.init} cannot be "
            f"used: it says {what}. Copy the whole adapter folder again."
        )
    found = read_weights(path)
    if shapes_of(found) != {name: one for name, one in shapes.items() if name.endswith((".experts.a", ".experts.b"))}:
        raise CheckpointError(f"{path} does not fit {WEIGHTS_FILE}. Copy the whole adapter folder again.")
    return found
