"""The speed of the fused layer, beside PEFT's layers of the same total rank and beside a loop over experts.

    python benchmarks/layer.py

One run compares everything in turn, round by round, and prints medians of ratios: machines are noisy, ratios less so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from machine import DEVICE, DTYPE, setting
from timing import seconds
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject

Step = Callable[[], None]


class LoopOverExperts(nn.Module):
    """What a straightforward implementation does: gather each expert's tokens, two products, scatter back."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.base, self.top_k, self.scale = base, top_k, 16 / rank
        self.router = nn.Parameter(torch.randn(num_experts, base.in_features) / 50)
        self.a = nn.ParameterList(torch.randn(base.in_features, rank) / 50 for _ in range(num_experts))
        self.b = nn.ParameterList(torch.randn(rank, base.out_features) / 50 for _ in range(num_experts))
        self.to(base.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = x_TD.float() @ self.router.float().t()
        top_TK, expert_TK = logits_TE.topk(self.top_k, dim=-1)
        gate_TK = top_TK.softmax(-1)
        y_TO = self.base(x_TD)
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            token, place = (expert_TK == expert).nonzero(as_tuple=True)
            part = (x_TD[token] @ a) @ b * (self.scale * gate_TK[token, place].unsqueeze(-1)).to(x_TD.dtype)
            y_TO = y_TO.index_add(0, token, part)
        return y_TO


def base_layer(size: int, device: torch.device) -> nn.Linear:
    """A frozen linear layer."""
    return nn.Linear(size, size, bias=False).to(device, DTYPE).requires_grad_(False)


def training_step(model: nn.Module, x_TD: Tensor, grad_TO: Tensor) -> Step:
    """Forward and backward with gradients of the input and of whatever is trainable."""

    def step() -> None:
        x_TD.grad = None
        model.zero_grad(set_to_none=True)
        model(x_TD).backward(grad_TO)

    return step


def routed(size: int, device: torch.device, **settings: Any) -> nn.Module:
    """Our layer; `b` starts at 0, which is no typical value."""
    model = nn.Sequential(base_layer(size, device))
    inject(model, AdapterConfig(target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("magnitude"):
            parameter.data.normal_(std=0.02)
    return model


def by_peft(size: int, device: torch.device, rank: int, use_dora: bool) -> nn.Module:
    """PEFT's layer of one expert."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=16, target_modules=["0"], init_lora_weights=use_dora, use_dora=use_dora
    )  # DoRA wants a start; the others need none
    model = peft.get_peft_model(nn.Sequential(base_layer(size, device)), config, autocast_adapter_dtype=False)
    return model.to(DTYPE)


def compare(num_experts: int, rank: int, top_k: int, args: argparse.Namespace) -> None:
    """Print the medians of one configuration."""
    device = DEVICE
    torch.manual_seed(0)
    x_TD = torch.randn(args.tokens, args.size, device=device, dtype=DTYPE, requires_grad=True)
    grad_TO = torch.randn(args.tokens, args.size, device=device, dtype=DTYPE)
    size, total_rank = args.size, num_experts * rank
    settings = {"r": rank, "num_experts": num_experts, "top_k": top_k}
    models = {
        "base": base_layer(size, device),
        "peft": by_peft(size, device, total_rank, use_dora=False),
        "peft dora": by_peft(size, device, total_rank, use_dora=True),
        "loop": LoopOverExperts(base_layer(size, device), num_experts, rank, top_k),
        **{kind: routed(size, device, expert=kind, **settings) for kind in ("lora", "moslora", "dora")},
    }
    steps = {name: training_step(model, x_TD, grad_TO) for name, model in models.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(args.rounds)]

    def ratio(top: str, bottom: str) -> float:
        return statistics.median(one[top] / one[bottom] for one in rounds)

    milliseconds = 1e3 * statistics.median(one["lora"] for one in rounds)
    print(
        f"E={num_experts:<3d} R={rank:<3d} K={top_k:<3d} ours {milliseconds:7.2f} ms | "
        f"ours / PEFT LoRA of rank {total_rank}: {ratio('lora', 'peft'):.2f} | "
        f"loop over experts / ours: {ratio('loop', 'lora'):.2f} | ours / bare base layer: {ratio('lora', 'base'):.2f}\n"
        f"{'':18s}moslora / ours: {ratio('moslora', 'lora'):.2f} | dora / ours: {ratio('dora', 'lora'):.2f} | "
        f"dora / PEFT DoRA of rank {total_rank}: {ratio('dora', 'peft dora'):.2f}"
    )


def main() -> None:
    """Parse the sizes, print one line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="in- and out-features")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    print(setting())
    print(f"D = O = {args.size}, {args.tokens} tokens, forward + backward with input gradient, dropout 0")
    for num_experts, rank, top_k in ((20, 4, 10), (8, 16, 2)):
        compare(num_experts, rank, top_k, args)


if __name__ == "__main__":
    main()
