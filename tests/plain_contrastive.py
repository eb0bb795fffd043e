"""The contrastive losses as anyone would write them, from the whole outputs of all experts, in fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.contrastive.sample import sample_tokens
from dsmoelora.config import LossesConfig
from dsmoelora.seeds import derive_seed


class PlainContrastive:
    """Listens to the experts of a model; `values` gets both losses of every step."""

    def __init__(self, model: Any) -> None:
        self.values: list[dict[str, float]] = []
        self._seen: dict[str, tuple[Any, Tensor, Tensor]] = {}
        for name, layer in adapted_layers(model):
            if layer.experts.shapes["a"][0] == 1:
                continue
            layer.experts.register_forward_pre_hook(partial(self._remember, name))

    def _remember(self, name: str, experts: Any, inputs: tuple[Any, ...]) -> None:
        _, x_TD, gate_TE = inputs
        self._seen[name] = experts, x_TD, gate_TE != 0

    def of_step(self, keys_BS: Tensor, mask_BS: Tensor, config: LossesConfig) -> Tensor | float:
        """What the step's losses add to that of the text: means over rows and layers."""
        if not (config.contrastive or config.contrastive_coactive):
            return 0.0
        found = []
        for name, (experts, x_TD, selected_TE) in self._seen.items():
            key, num_tokens = derive_seed("contrastive", name), config.contrastive_tokens
            sample = sample_tokens(keys_BS, mask_BS.bool(), None, key, num_tokens)
            for places_N, real_N in zip(sample.places_BN, sample.real_BN, strict=True):
                places = places_N[real_N]
                given = (each.double() for each in (x_TD[places], experts.a, experts.b))
                outputs_NEO = torch.einsum("nd,edr,eor->neo", *given)
                found.append(torch.stack(of_tokens(outputs_NEO, selected_TE[places], config.contrastive_temperature)))
        apart, together = torch.stack(found).mean(0)
        self.values.append({"contrastive": apart.item(), "contrastive_coactive": together.item()})
        return (config.contrastive * apart + config.contrastive_coactive * together).float()


def of_tokens(outputs_NEO: Tensor, selected_NE: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """`contrastive` and `contrastive_coactive` of one sequence, of which these tokens were drawn."""
    unit = torch.nn.functional.normalize(outputs_NEO.double(), dim=-1)
    apart, together = [], []
    used = [(n, e) for n in range(len(unit)) for e in range(unit.shape[1]) if selected_NE[n, e]]
    for n, e in used:
        score = (unit @ unit[n, e] / tau).exp()
        negatives = sum(score[m, f] for m, f in used if f != e)
        positives = [score[m, f] for m, f in used if f == e and m != n]
        if positives and isinstance(negatives, Tensor):
            apart.append(torch.stack([-(p / (p + negatives)).log() for p in positives]).mean())
        own, used_here = score[n], selected_NE[n].clone()
        rest = own[~used_here]
        used_here[e] = False
        if len(rest) and used_here.any():
            together.append(-(own[used_here] / (own[used_here] + rest.sum())).log().mean())
    zero = outputs_NEO.double().sum() * 0
    return torch.stack(apart).mean() if apart else zero, torch.stack(together).mean() if together else zero
