"""The routers' losses and biases as anyone would write them in plain torch, on a whole global batch at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.routers import routers
from dsmoelora.config import LossesConfig


class PlainRouterLosses:
    """Listens to the routers of a model; `values` gets balance (with its own step's counts) and z of every step."""

    def __init__(self, model: Any) -> None:
        self.values: list[dict[str, float]] = []
        self._logits: dict[str, Tensor] = {}
        self._selected: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}
        for name, router in routers(model):
            adapter_context(model).hooked = True
            router.register_forward_hook(partial(self._remember, name))

    def _remember(self, name: str, router: Any, inputs: tuple[Tensor], gate_TE: Tensor) -> None:
        is_constant = router.weight.shape[-1] == 1
        weight_DE, x_TD = router.weight.T, inputs[0]
        self._logits[name] = weight_DE.expand(len(x_TD), -1) if is_constant else x_TD @ weight_DE
        self._selected[name] = gate_TE != 0

    def move_biases(self, model: Any, mask_BS: Tensor) -> None:
        """Selection biases, where the routers have them, one step towards balance."""
        for name, router in routers(model):
            if hasattr(router, "bias_steps"):
                counts_E = self._selected[name][mask_BS.flatten().bool()].sum(0).tolist()
                for expert, count in enumerate(counts_E):
                    mean = sum(counts_E) / len(counts_E)
                    router.bias_steps[expert] += (count < mean) - (count > mean)

    def of_step(self, mask_BS: Tensor, config: LossesConfig) -> Tensor | float:
        """What the step's losses add to that of the text."""
        if not (config.balance or config.z):
            return 0.0
        real_T = mask_BS.flatten().bool()
        balances, true_balances, zs = [], [], []
        for name, logits_TE in self._logits.items():
            mean_E = logits_TE[real_T].softmax(-1).mean(0)
            num_experts = len(mean_E)
            counts_E = self._selected[name][real_T].sum(0).to(mean_E.dtype)
            before_E = self._shares.get(name, torch.full_like(counts_E, 1 / num_experts))
            self._shares[name] = counts_E / counts_E.sum()
            balances.append(num_experts * (before_E * mean_E).sum())
            true_balances.append(num_experts * float((self._shares[name] * mean_E.detach()).sum()))
            zs.append(logits_TE[real_T].logsumexp(-1).square().mean())
        self.values.append({"balance": sum(true_balances) / len(balances), "z": float(torch.stack(zs).detach().mean())})
        total: Tensor = config.balance * torch.stack(balances).mean() + config.z * torch.stack(zs).mean()
        return total
