"""Every rank of given adapters as an expert of its own.

    s b a^T = sum_r s b_r a_r^T      expert (e, r) of rank 1: a_r, b_r, with scale s E' / E

for E adapters of E' ranks in all: with gates of 1 / E' the mixture is the mean of the adapters. SMoRA (Zhao et al.
2025, arXiv 2501.15103) routes single ranks, SmartFed those of adapters that were trained apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from dsmoelora.adapters.given.experts import GivenExperts, GivenFolder, GivenLayer


def split_folders(folders: Sequence[GivenFolder]) -> list[GivenFolder]:
    """The same adapters, their ranks as experts; where a layer has fewer than others, `a` and `b` of the rest are 0."""
    num_adapters = sum(folder.num_experts for folder in folders)
    num_ranks = sum(folder.num_experts * folder.rank for folder in folders)
    return [_split(folder, num_ranks / num_adapters) for folder in folders]


def _split(folder: GivenFolder, share: float) -> GivenFolder:
    count = folder.num_experts * folder.rank
    layers = {
        name: GivenLayer(count, layer.in_features, layer.out_features, 1, layer.scale * share)
        for name, layer in folder.layers.items()
    }
    read = partial(_read, folder)
    # routers and gates were for whole adapters
    return replace(
        folder, num_experts=count, layers=layers, read=read, plain_layers=frozenset(), router=None, gates=None
    )


def _read(folder: GivenFolder, layer: str, experts: range) -> GivenExperts:
    rank = folder.rank
    adapters = range(experts.start // rank, -(-experts.stop // rank))
    found = folder.read(layer, adapters).without_mixer()
    first = adapters.start * rank

    def columns(factor_EXR: Tensor) -> Tensor:
        padded_EXR = nn.functional.pad(factor_EXR, (0, rank - factor_EXR.shape[-1]))
        each_EX = padded_EXR.transpose(1, 2).flatten(0, 1)
        return each_EX[experts.start - first : experts.stop - first].unsqueeze(-1)

    return GivenExperts(columns(found.a_EDR), columns(found.b_EOR))
