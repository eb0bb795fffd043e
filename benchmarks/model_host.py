"""What Python and dispatch cost where the arithmetic is next to nothing: many layers, few tokens, forward and backward.

    python benchmarks/model_host.py

One layer alone does not show what grows with the number of layers. The log of the routers is on, as the engine has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from machine import DEVICE, setting
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import LossesConfig

WIDTH, NUM_TOKENS = 8, 8


class Chain(nn.Module):
    """Linear layers one after another."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers))
        self.to(DEVICE).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        for layer in self.layers:
            x = layer(x)
        return x


def routed(num_layers: int, losses: LossesConfig) -> nn.Module:
    """Ours, with its log on."""
    model = Chain(num_layers)
    inject(model, AdapterConfig(target_modules="all-linear", num_experts=4, top_k=2, r=2))
    context = adapter_context(model)
    context.tokens = BatchTokens(real_BS=torch.ones(1, NUM_TOKENS, dtype=torch.bool, device=DEVICE))
    log = RoutingLog(model, losses, DEVICE)
    log.begin_step(NUM_TOKENS, 1.0)
    context.log = log
    model.train()
    forward = model.forward

    def listened(x: Tensor) -> Tensor:
        with log.listening():
            return forward(x)

    model.forward = listened  # type: ignore[method-assign]
    return model


def by_peft(num_layers: int) -> nn.Module:
    """PEFT's LoRA of the same total rank."""
    config = peft.LoraConfig(r=8, target_modules=[f"layers.{number}" for number in range(num_layers)])
    return peft.inject_adapter_in_model(config, Chain(num_layers))


def forward_and_backward(model: nn.Module) -> tuple[float, float]:
    """CPU seconds of this process for one of each."""
    x = torch.randn(NUM_TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    begin = time.process_time()
    y = model(x)
    middle = time.process_time()
    y.sum().backward()
    return middle - begin, time.process_time() - middle


def main() -> None:
    """Print a table over numbers of layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[28, 224])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(setting())
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "PEFT LoRA": by_peft,
        "routed": lambda count: routed(count, LossesConfig()),
        "routed, balance and z": lambda count: routed(count, LossesConfig(balance=0.01, z=0.001)),
    }
    for count in args.layers:
        models = {name: make(count) for name, make in kinds.items()}
        rounds = [{name: forward_and_backward(model) for name, model in models.items()} for _ in range(args.rounds)]
        for name in models:
            forward, backward = (statistics.median(one[name][part] for one in rounds) * 1e3 for part in (0, 1))
            ratios = [sum(one[name]) / sum(one["PEFT LoRA"]) for one in rounds]
            print(
                f"{count:4d} layers, {name:22s} forward {forward:7.1f} ms, backward {backward:7.1f} ms, "
                f"both / PEFT's {statistics.median(ratios):.2f}"
            )


if __name__ == "__main__":
    main()
