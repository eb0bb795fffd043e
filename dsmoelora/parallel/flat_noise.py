"""`optim.flat_noise`: noise in the pieces of the frozen weights that a rank holds, for the passes of a step alone.

A rank puts its pieces aside, writes noise into them where they lie, and copies them back before anybody else looks:
adding and subtracting would round, and the base would drift away. Nothing is gathered but the experts' factors of one
layer after another; squared lengths of rows that ranks have cut are summed, for all layers in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters import RoutedLinear, adapted_layers
from dsmoelora.adapters.routers.given import ConstantRouter, constant_gates
from dsmoelora.adapters.targets.linear import features
from dsmoelora.config import Recipe
from dsmoelora.errors import bad_value
from dsmoelora.optim.flat_noise import NoisyWeight, ramp
from dsmoelora.parallel import comm, zero
from dsmoelora.parallel.factors import of_all_experts
from dsmoelora.parallel.placement import ExpertPlacement


class FlatNoise:
    """Flat-LoRA on what this rank holds; see `optim.flat_noise` for the rule.

    The merged weight of a mixture has the gates of its `constant` router, or else the mean gate of each routed expert,
    1 / E; that of shared experts is 1.

    Args:
        model: adapted
        recipe: of the run
        placement: of the experts

    Raises:
        ConfigError: another module reads a weight that noise is meant for
    """

    def __init__(self, model: nn.Module, recipe: Recipe, placement: ExpertPlacement) -> None:
        self._recipe, self._placement = recipe, placement
        self._layers = [layer for _, layer in adapted_layers(model)] if recipe.optim.flat_noise else []
        self._clean: list[Tensor] = []
        _check_own_weights(model, self._layers, recipe.optim.flat_noise)

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """Noise inside the block, and after it, however it ends, every piece as it was, to the last bit (collective).

        Args:
            step: optimizer steps taken
        """
        recipe = self._recipe
        sigma = recipe.optim.flat_noise * ramp(step, recipe.train.max_steps)
        if not sigma:
            yield
            return
        self._put_aside()
        try:
            self._write(sigma, step)
            yield
        finally:
            self._restore()

    def _put_aside(self) -> None:
        pieces = [zero.held_piece(layer.base.weight)[0] for layer in self._layers]
        if not self._clean:
            self._clean = [torch.empty_like(piece) for piece in pieces]
        for clean, piece in zip(self._clean, pieces, strict=True):
            clean.copy_(piece)

    @torch.no_grad()
    def _write(self, sigma: float, step: int) -> None:
        weights, squares = [], []
        for layer, clean in zip(self._layers, self._clean, strict=True):
            num_inputs, num_outputs = features(layer.base)
            has_output_rows = isinstance(layer.base, nn.Linear)
            shape = (num_outputs, num_inputs) if has_output_rows else (num_inputs, num_outputs)
            weights.append(NoisyWeight(layer.name, shape, has_output_rows))
            start = zero.held_piece(layer.base.weight)[1]
            squares.append(weights[-1].squares(clean, start, *self._update(layer)))
        if any(zero.is_partitioned(layer.base.weight) for layer in self._layers):
            squares = list(comm.sum_over_ranks(torch.cat(squares)).split([len(one) for one in squares]))
        for layer, weight, clean, squares_O in zip(self._layers, weights, self._clean, squares, strict=True):
            piece, start = zero.held_piece(layer.base.weight)
            std_O = sigma * (squares_O / weight.num_inputs).sqrt()
            weight.add_noise(piece, clean, start, std_O, self._recipe.run.seed, step)
            zero.forget_whole(layer.base.weight)
        get_accelerator().synchronize()  # ZeRO-3 gathers on a stream of its own, which does not wait for this one

    def _restore(self) -> None:
        for layer, clean in zip(self._layers, self._clean, strict=True):
            zero.held_piece(layer.base.weight)[0].copy_(clean)
            zero.forget_whole(layer.base.weight)

    def _update(self, layer: RoutedLinear) -> tuple[Tensor, Tensor]:
        """Factors (O, E R) and (D, E R) of the mean update of a layer, fp32, on the accelerator (collective)."""
        bank, router = layer.experts, layer.router
        given = [router.weight] if isinstance(router, ConstantRouter) else []
        own = [factor for factor in (bank.a, bank.b, bank.m) if factor is not None]
        num_experts = bank.shapes["a"][0]
        with zero.gathered([*own, *given]):
            a_EDR, b_EOR, *m_ERR = (of_all_experts(one.detach(), num_experts, self._placement).float() for one in own)
            gates_E = self._gates(layer, [one.detach() for one in given]).to(b_EOR)
        for mixer in m_ERR:
            b_EOR = b_EOR @ mixer.mT
        weighed = bank.scale * gates_E[:, None, None] * b_EOR
        return _side_by_side(weighed), _side_by_side(a_EDR)

    def _gates(self, layer: RoutedLinear, weights: list[Tensor]) -> Tensor:
        config = self._recipe.adapter
        if weights:
            assert config.router_start is not None, "the router `constant` has it"
            return constant_gates(weights[0], config.router_start)
        num_experts = layer.experts.shapes["a"][0]
        num_own = min(num_experts, layer.num_routed)
        shares = [1.0 / layer.num_routed] * num_own + [1.0] * (num_experts - num_own)
        return torch.tensor(shares, device=get_accelerator().current_device_name())


def _side_by_side(factor_EXR: Tensor) -> Tensor:
    """(X, E R)."""
    return factor_EXR.transpose(0, 1).flatten(1)


def _check_own_weights(model: nn.Module, layers: list[RoutedLinear], sigma: float) -> None:
    owners: dict[int, list[Any]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        others = [name for name in owners[id(layer.base.weight)] if name != f"{layer.name}.base"]
        if others:
            raise bad_value(
                "optim.flat_noise",
                sigma,
                f"0 where {layer.name} is adapted, for {others[0]} reads the same weight and would get its noise",
                f"Take {layer.name} out of adapter.target_modules (or adapter.lora_modules).",
            )
