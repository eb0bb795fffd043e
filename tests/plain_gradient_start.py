"""Experts that start from the whole gradient, as the formula has it: a (D, O) matrix for each of them, and its SVD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsmoelora import AdapterConfig
from dsmoelora.adapters import adapted_layers

COLUMN_LENGTH = 3**-0.5  # of numbers with the variance 1 / (3 D)


def gradients_of_experts(model: Any, config: AdapterConfig, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """`s sum_t g_te^gate_power x_t^T dy_t`, (E, D, O) fp64, of every adapted layer.

    Args:
        model: adapted, with routers `softmax_topk` where there are any, and `a` at 0: layers say what their bases say
        config: of the adapter
        loss: of some rows
    """
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = [inputs[0].detach().flatten(0, -2).double()]
            output.register_hook(lambda grad: seen[name].append(grad.flatten(0, -2).double()))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in adapted_layers(model)]
    loss().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {
        name: config.scale * torch.einsum("te,td,to->edo", _gates(layer, config, seen[name][0]), *seen[name])
        for name, layer in adapted_layers(model)
    }


def _gates(layer: Any, config: AdapterConfig, x_TD: Tensor) -> Tensor:
    if layer.experts.shapes["a"][0] == 1:
        return torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
    logits_TE = x_TD @ layer.router.weight.detach().double().T
    last_T1 = logits_TE.topk(config.num_used).values[:, -1:]
    gate_TE = logits_TE.masked_fill(logits_TE < last_T1, -torch.inf).softmax(-1)
    gate_TE = torch.where(gate_TE > 0, gate_TE**config.gate_power, 0.0)
    return torch.cat((gate_TE, gate_TE.new_ones(len(x_TD), config.shared_experts)), dim=1)


def polar(z_DC: Tensor) -> Tensor:
    """The orthogonal factor of `z`, with columns of the length of a draw."""
    u, _, vt = torch.linalg.svd(z_DC, full_matrices=False)
    return COLUMN_LENGTH * u @ vt


def sketches(gradient_EDO: Tensor, omega_EOR: Tensor, mixer_ERR: Tensor | None = None) -> Tensor:
    """(E, D, R) fp64: what each expert sees of its gradient, normed to 1."""
    omega_EOR = omega_EOR.detach().double()
    if mixer_ERR is not None:
        omega_EOR = omega_EOR @ mixer_ERR.detach().double().mT
    sketch_EDR = gradient_EDO @ omega_EOR
    return sketch_EDR / sketch_EDR.flatten(1).norm(dim=1)[:, None, None]


def start_plainly(model: Any, config: AdapterConfig, loss: Callable[[], Tensor]) -> list[float]:
    """Put the start in place; returns the condition numbers of what is orthogonalised, where all of it is there."""
    conditions = []
    with torch.enable_grad():
        gradients = gradients_of_experts(model, config, loss)
    for name, layer in adapted_layers(model):
        bank = layer.experts
        z_EDR = sketches(gradients[name], bank.b, bank.m)
        if config.init_spread == "joint":
            joined_DC = polar(torch.cat(list(z_EDR), dim=1))
            start_EDR = torch.stack(joined_DC.split(z_EDR.shape[-1], dim=1))
            conditions.append(float(torch.linalg.cond(torch.cat(list(z_EDR), dim=1))))
        else:
            start_EDR = torch.stack([polar(z_DR) for z_DR in z_EDR])
            conditions += [float(torch.linalg.cond(z_DR)) for z_DR in z_EDR]
        bank.a.data.copy_(start_EDR)
        bank.b.data.zero_()
    return conditions
