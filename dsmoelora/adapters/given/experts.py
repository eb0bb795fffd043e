"""What a folder of an adapter is to those who start from it or merge it, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmoelora.adapters.experts.function import outgoing
from dsmoelora.config.adapter_options import RouterName, RouterStart
from dsmoelora.errors import CheckpointError


@dataclass(frozen=True)
class GivenLayer:
    """One adapted layer of a folder.

    Args:
        num_experts: on this layer; 1 where it has no router
        in_features, out_features: D and O
        rank: R of each expert
        scale: s
    """

    num_experts: int
    in_features: int
    out_features: int
    rank: int
    scale: float


@dataclass(frozen=True)
class GivenExperts:
    """Some experts of a layer, as they lie in the file: `delta W_e^T = s a_e m_e b_e^T`.

    Args:
        a_EDR: (E, D, R)
        b_EOR: (E, O, R)
        m_ERR: mixers (E, R, R), where there are any
    """

    a_EDR: Tensor
    b_EOR: Tensor
    m_ERR: Tensor | None = None

    def without_mixer(self) -> GivenExperts:
        """The same experts, their mixers folded into `b` (fp32)."""
        if self.m_ERR is None:
            return self
        return GivenExperts(self.a_EDR, outgoing(self.b_EOR.float(), self.m_ERR.float()))


@dataclass(frozen=True)
class GivenFolder:
    """A folder, of which the headers are read and the numbers are to be had layer by layer.

    Args:
        path: where it lies
        base_model: path or name of the base model, as the folder says
        num_experts: that it brings to every layer
        layers: by name
        read: some experts of a layer; one with a single expert has that one for each of the folder's
        base: fingerprint of the base model, where the folder has one (see `adapters.fingerprint`)
        plain_layers: names of the layers without a router among those with one
        routers: shapes of what the routers keep, by qualified name
        router: kind of the routers, and how their gates are made where that is a setting; None without any
        gates: where these are the same for every token, those of a layer (E,)
    """

    path: Path
    base_model: str
    num_experts: int
    layers: Mapping[str, GivenLayer]
    read: Callable[[str, range], GivenExperts]
    base: Mapping[str, Any] | None = None
    plain_layers: frozenset[str] = frozenset()
    routers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    router: tuple[RouterName, RouterStart | None] | None = None
    gates: Callable[[str], Tensor] | None = None

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def scale(self) -> float:
        """Of its first layer."""
        return next(iter(self.layers.values())).scale


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name; the header alone is read.

    Raises:
        CheckpointError: missing or damaged
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the adapter folder again.") from error


def tensors_in(path: Path, names: list[str], rows: slice = slice(None)) -> list[Tensor]:
    """Tensors of a safetensors file, or the same rows of each.

    Raises:
        CheckpointError: damaged, or one has a number that is not finite
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = [file.get_slice(name)[rows] for name in names]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the adapter folder again.") from error
    for name, tensor in zip(names, found, strict=True):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} has numbers in {name} that are not finite. Take another adapter.")
    return found
