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
START_FILE = "start.safetensors"  # with `init: svd`: what the base was shifted by
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


def read_start(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The start factors of an adapter with `init: svd`, by the names of the factors.

    Args:
        folder: of the adapter
        tensors: its weights

    Raises:
        CheckpointError: missing, damaged, or of other shapes than the factors
    """
    path = folder / START_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {START_FILE}, without which an adapter with adapter.init = svd cannot be used: it says "
            "what the base model was shifted by. Copy the whole adapter folder again."
        )
    start = read_weights(path)
    factors = {name: value for name, value in tensors.items() if name.endswith((".experts.a", ".experts.b"))}
    if shapes_of(start) != shapes_of(factors):
        raise CheckpointError(f"{path} does not fit {WEIGHTS_FILE}. Copy the whole adapter folder again.")
    return start
