"""Factors of a layer in one piece, however ZeRO and expert parallelism have cut them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.similarity import ExpertCosines, cosine_matrix, largest_and_mean
from dsmoelora.adapters.layer import adapted_layers
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.placement import ExpertPlacement


def of_all_experts(own: Tensor, num_rows: int, placement: ExpertPlacement) -> Tensor:
    """The experts of all ranks, from a gathered parameter that may hold one rank's (collective).

    Args:
        own: (L, ...)
        num_rows: how many all ranks hold together
        placement: of the experts
    """
    return own if len(own) == num_rows else comm.all_gather_tensor(own, placement.expert_group)


def expert_cosines(model: nn.Module, placement: ExpertPlacement) -> ExpertCosines:
    """How alike the updates of the experts are, layer by layer; the same on all ranks (collective).

    Gathers the factors of one layer after another: E R (D + O) numbers each, what a forward pass gathers for it too.
    """
    found: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        bank = layer.experts
        num_experts = bank.shapes["a"][0]
        if num_experts == 1:
            continue
        own = [factor for factor in (bank.a, bank.b, bank.m) if factor is not None]
        with zero.gathered(own), torch.no_grad():
            factors = [of_all_experts(factor.detach(), num_experts, placement) for factor in own]
            found[name] = largest_and_mean(cosine_matrix(*factors))
    if not found:
        return ExpertCosines([], [], [])
    # one transfer to the host for all layers
    per_layer = torch.cat(list(found.values())).cpu().split([len(one) for one in found.values()])
    numbers = [one.tolist() for one in per_layer]
    return ExpertCosines(list(found), [one[:-1] for one in numbers], [one[-1] for one in numbers])
