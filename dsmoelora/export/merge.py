"""Several adapters as one, layer by layer: two factors whose product is the weighed sum of their updates.

    cat        a = [a_1 ... a_n],  b = [w_1 s_1 b_1 ... w_n s_n b_n]      exact, rank r_1 + ... + r_n
    svd        the best approximation of that of a given rank (Eckart & Young 1936)
    average    a = a_1 = ... = a_n,  b = sum_i w_i (s_i / s_1) b_i        exact, rank r: FFA-LoRA's (arXiv 2403.12313)

An adapter with the router `constant` is such an update too: its experts side by side, `b` times their gates.
`cat` is what FLoRA adds to the base after a round (Wang et al. 2024, arXiv 2409.05976).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.products import side_by_side
from dsmoelora.adapters.fingerprint import difference, fingerprint
from dsmoelora.adapters.given import GivenFolder
from dsmoelora.adapters.targets.linear import features, is_linear, weight_of
from dsmoelora.errors import CheckpointError, ModelError, bad_value, listing
from dsmoelora.export.average import truncated
from dsmoelora.export.peft_folder import Lora

Method = Literal["cat", "svd", "average"]
KEY = "--adapters"


@dataclass(frozen=True)
class MergedLayer:
    """The merged update `scale b a^T` of one layer, in the dtype of the adapters.

    Args:
        name: of the layer
        a_DR: (D, R)
        b_OR: (O, R)
    """

    name: str
    a_DR: Tensor
    b_OR: Tensor


@dataclass(frozen=True)
class Merge:
    """What is merged, and how.

    Args:
        folders: of the adapters
        weights: of each
        method: see above
        rank: of the result, the same in all layers
        scale: of the result
    """

    folders: Sequence[GivenFolder]
    weights: Sequence[float]
    method: Method
    rank: int
    scale: float

    def layers(self) -> Iterator[MergedLayer]:
        """One layer after the other; the numbers of no two are in memory.

        Raises:
            ConfigError: `average` of adapters whose `a` differ
            CheckpointError: a folder is damaged
        """
        merged = self._averaged if self.method == "average" else self._joined
        for name in dict.fromkeys(name for folder in self.folders for name in folder.layers):
            a_DF, b_OF = merged(name)
            padding = (0, self.rank - a_DF.shape[1])
            yield MergedLayer(name, *(nn.functional.pad(factor, padding).contiguous() for factor in (a_DF, b_OF)))

    def lora(self) -> Lora:
        """All layers, as one adapter."""
        layers = {layer.name: (layer.a_DR.t(), layer.b_OR) for layer in self.layers()}
        return Lora(self.rank, float(f"{self.scale * self.rank:.12g}"), False, layers)

    def _joined(self, name: str) -> tuple[Tensor, Tensor]:
        parts = []
        for folder, weight in zip(self.folders, self.weights, strict=True):
            if name in folder.layers:
                a_DR, b_OR = _factors(folder, name)
                parts.append((a_DR, (b_OR.double() * (weight * folder.layers[name].scale)).to(b_OR.dtype)))
        a_DF, b_OF = (torch.cat(factors, 1) for factors in zip(*parts, strict=True))
        if self.method == "svd" and self.rank < a_DF.shape[1]:
            dtype = a_DF.dtype
            a_DF, b_OF = (factor.to(dtype) for factor in truncated(a_DF.double(), b_OF.double(), self.rank))
        return a_DF, b_OF

    def _averaged(self, name: str) -> tuple[Tensor, Tensor]:
        first, b_sum = None, None
        for folder, weight in zip(self.folders, self.weights, strict=True):
            a_DR, b_OR = _factors(folder, name) if name in folder.layers else (None, None)
            first = a_DR if first is None else first
            if a_DR is None or b_OR is None or first is None or not torch.equal(a_DR, first):
                what = "has no such layer" if a_DR is None else "has another one"
                raise bad_value(
                    "--method",
                    "average",
                    f"cat or svd where the factors `a` differ, and {folder.path} {what} than {self.folders[0].path} in "
                    f"{name}: an average of both factors is no average of the updates",
                    "Take cat or svd, or train with adapter.freeze: [a] from one start.",
                )
            share = b_OR.double() * (weight * folder.layers[name].scale / self.scale)
            b_sum = share if b_sum is None else b_sum + share
        assert first is not None and b_sum is not None, "there is an adapter"
        return first, b_sum.to(first.dtype)


def plan_merge(
    folders: Sequence[GivenFolder], weights: Sequence[float] | None, method: Method, rank: int | None
) -> Merge:
    """See that the adapters belong together; no numbers are read.

    Args:
        folders: of the adapters
        weights: of each; None for 1 / n
        method: how
        rank: of `svd`; None for the largest

    Raises:
        ConfigError: as many weights as adapters are wanted, or an adapter is a mixture
        CheckpointError: adapters of different base models
    """
    count = len(folders)
    if weights is not None and len(weights) != count:
        raise bad_value("--weights", list(weights), f"{count} numbers, one for each of {KEY}", "Give as many.")
    for folder in folders:
        if folder.num_experts > 1 and folder.gates is None:
            allowed = f"an adapter that is one update, and this one has {folder.num_experts} experts that are routed"
            remedy = "Make one of them first: launch/export.py --format average."
            raise bad_value(KEY, str(folder.path), allowed, remedy)
    for folder in folders[1:]:
        _check_belongs(folders[0], folder)
    sums = {name: [_rank(folder, name) for folder in folders if name in folder.layers] for name in _names(folders)}
    full = max(map(sum, sums.values())) if method != "average" else max(map(max, sums.values()))
    largest = max(_rank(folder, name) for folder in folders for name in folder.layers)
    wanted = min(full, rank or largest) if method == "svd" else full
    scale = folders[0].scale if method == "average" else 1.0
    return Merge(folders, weights or count * [1 / count], method, wanted, scale)


def _names(folders: Iterable[GivenFolder]) -> list[str]:
    return list(dict.fromkeys(name for folder in folders for name in folder.layers))


def _check_belongs(first: GivenFolder, other: GivenFolder) -> None:
    """Whether two adapters can be of one base model."""
    what = None
    if first.base is not None and other.base is not None:
        what = difference(first.base, other.base)
    for name in first.layers.keys() & other.layers.keys():
        shapes = [(folder.layers[name].in_features, folder.layers[name].out_features) for folder in (first, other)]
        what = what or (None if shapes[0] == shapes[1] else f"{name} has shape {shapes[0]} and {shapes[1]}")
    if what is not None:
        raise CheckpointError(f"{first.path} and {other.path} belong to different base models: {what}. Merge others.")


def check_base(folders: Iterable[GivenFolder], base: Mapping[str, Any]) -> None:
    """Refuse a base model that is not the one of every adapter that has a fingerprint of its own.

    Raises:
        CheckpointError: it is another
    """
    for folder in folders:
        what = None if folder.base is None else difference(folder.base, base)
        if what is not None:
            raise CheckpointError(f"{folder.path} belongs to another base model: {what}. Give its own with --model.")


def _rank(folder: GivenFolder, name: str) -> int:
    return folder.layers[name].num_experts * folder.layers[name].rank


def _factors(folder: GivenFolder, name: str) -> tuple[Tensor, Tensor]:
    """(D, F) and (O, F): those of the one expert, or of all side by side, each times the gate that every token has."""
    found = folder.read(name, range(folder.layers[name].num_experts)).without_mixer()
    if folder.gates is None:
        return found.a_EDR[0], found.b_EOR[0]
    gate_E11 = folder.gates(name)[:, None, None]
    return side_by_side(found.a_EDR), side_by_side((found.b_EOR.double() * gate_E11).to(found.b_EOR.dtype))


@torch.no_grad()
def add_to_base(model: Any, merge: Merge) -> float:
    """`W0 <- W0 + scale b a^T` for every layer, one after the other, in fp32 and rounded once.

    Args:
        model: the base model, whole
        merge: what to add

    Returns:
        what rounding to the dtype of the weights changes, as a share of the update (Frobenius norms over all layers)

    Raises:
        CheckpointError: the adapters belong to another base model
        ModelError: a weight belongs to another module too, which would change with it
    """
    check_base(merge.folders, fingerprint(model.named_parameters()))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    modules, lost, added = dict(model.named_modules()), 0.0, 0.0
    for layer in merge.layers():
        base = modules[layer.name]
        assert is_linear(base) and features(base) == (len(layer.a_DR), len(layer.b_OR)), "looked at before"
        others = [name for name in owners[id(base.weight)] if name != layer.name]
        if others:
            raise ModelError(
                f"{layer.name} shares its weight with {listing(others)}, which the update would change too. Write an "
                "adapter with --out instead."
            )
        weight, factors = weight_of(base), (layer.b_OR, layer.a_DR)
        b_OR, a_DR = (factor.to(weight.device, torch.float32) for factor in factors)
        update = merge.scale * b_OR @ a_DR.t()
        wanted = weight.float() + update
        weight.copy_(wanted)
        lost += float(wanted.sub_(weight).square_().sum())
        added += float(update.square_().sum())
    return (lost / added) ** 0.5 if added else 0.0
