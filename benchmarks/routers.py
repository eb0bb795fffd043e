"""What each router costs, and what counting and the losses add: time of the whole layer beside `softmax_topk` alone.

    python benchmarks/routers.py

Everything runs in every round, in another order each time; printed are medians of ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast, get_args

import torch
from machine import DEVICE, DTYPE, setting
from timing import seconds
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.contrastive import ContrastiveLosses
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import LossesConfig
from dsmoelora.config.adapter_options import RouterName

NUM_SEQUENCES = 8


def training_step(
    router: RouterName, x_BSD: Tensor, grad_BSD: Tensor, losses: LossesConfig | None = None
) -> Callable[[], None]:
    """Forward and backward of one layer, with the gradient of the input; `losses` has its router listened to."""
    size, device = x_BSD.shape[-1], x_BSD.device
    model = nn.Sequential(nn.Linear(size, size, bias=False, device=device, dtype=DTYPE))
    inject(model, AdapterConfig(r=4, num_experts=20, router=router, target_modules="all-linear"))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    context, real_BS = adapter_context(model), torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=device)
    keys_BS = token_keys(0, torch.arange(len(x_BSD), device=device), real_BS)
    context.tokens = BatchTokens(keys_BS, real_BS, prompt_BS=real_BS)
    listening: Callable[[], AbstractContextManager[None]] = nullcontext
    if losses is not None:
        log = RoutingLog(model, losses, device)
        log.begin_step(real_BS.numel(), scale=1.0)
        context.log, listening = log, log.listening
        context.losses = contrastive = ContrastiveLosses(model, losses, device, num_used=10)
        contrastive.begin_step(len(x_BSD), scale=1.0)

    def step() -> None:
        x_BSD.grad = None
        model.zero_grad(set_to_none=True)
        with listening():
            y_BSD = model(x_BSD)
        y_BSD.backward(grad_BSD)

    return step


def main() -> None:
    """Print a line for each router, and one for each thing that listens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="in- and out-features")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    shape = (NUM_SEQUENCES, args.tokens // NUM_SEQUENCES, args.size)
    x_BSD = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad_BSD = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    names = cast(tuple[RouterName, ...], get_args(RouterName))
    steps: dict[str, Callable[[], None]] = {name: training_step(name, x_BSD, grad_BSD) for name in names}
    listened = {
        "softmax_topk, counted": LossesConfig(),
        "softmax_topk, counted, balance and z": LossesConfig(0.01, 0.001),
        "softmax_topk, counted, contrastive": LossesConfig(contrastive=0.01),
        "softmax_topk, counted, contrastive_coactive": LossesConfig(contrastive_coactive=0.01),
    }
    steps |= {name: training_step("softmax_topk", x_BSD, grad_BSD, losses) for name, losses in listened.items()}
    for step in steps.values():
        step()
    rounds = [
        {name: seconds(steps[name]) for name in random.sample(list(steps), len(steps))} for _ in range(args.rounds)
    ]
    print(setting())
    print(f"D = O = {args.size}, {args.tokens} tokens, E=20 R=4 K=10, forward + backward of the layer")
    for name in steps:
        ratio = statistics.median(one[name] / one["softmax_topk"] for one in rounds)
        print(f"{name:45s} {ratio:.2f}x")


if __name__ == "__main__":
    main()
