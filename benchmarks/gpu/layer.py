"""The layer beside PEFT's LoRA of equal rank on a GPU, by CUDA events.

python -m benchmarks.gpu.layer
"""

from __future__ import annotations

import argparse

import peft
import torch
from torch import Tensor, nn

from benchmarks.gpu.device import chosen, milliseconds, num_kernels, peak_gib
from dsmoelora import AdapterConfig, inject

CONFIGURATIONS = ((20, 4, 10), (8, 16, 2))


def routed(base: nn.Linear, num_experts: int, rank: int, top_k: int, expert: str) -> nn.Module:
    """Our layer; `b` starts at 0, which is no typical value."""
    model = nn.Sequential(base)
    settings = {"r": rank, "num_experts": num_experts, "top_k": top_k, "expert": expert}
    inject(model, AdapterConfig(target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("experts.b"):
            nn.init.normal_(parameter, std=0.02)
    return model


def by_peft(base: nn.Linear, rank: int, use_dora: bool) -> nn.Module:
    """PEFT's layer of one expert."""
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["0"], use_dora=use_dora)
    return peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)


def pass_through(model: nn.Module, x_TD: Tensor) -> None:
    """Forward and backward, with the gradient of the input."""
    model.zero_grad(set_to_none=True)
    x_TD.grad = None
    y_TO = model(x_TD)
    y_TO.backward(torch.ones_like(y_TO))


def main(arguments: list[str] | None = None) -> None:
    """One line a layer: milliseconds, ratio to PEFT's, kernels, peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape in fp32 on the CPU")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args(arguments)
    device = chosen(args.dry_run)
    size, tokens, rounds = (64, 16, 2) if args.dry_run else (args.size, args.tokens, args.rounds)
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    print(f"{device}, {dtype}, D = O = {size}, {tokens} tokens, forward + backward")
    x_TD = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)

    def base() -> nn.Linear:
        return nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)

    for num_experts, rank, top_k in CONFIGURATIONS:
        models = {
            "base alone": base(),
            "PEFT LoRA": by_peft(base(), num_experts * rank, use_dora=False),
            "PEFT DoRA": by_peft(base(), num_experts * rank, use_dora=True),
            **{kind: routed(base(), num_experts, rank, top_k, kind) for kind in ("lora", "moslora", "dora")},
        }
        times = {}
        for name, model in models.items():
            peak_gib(device)
            times[name] = milliseconds(lambda one=model: pass_through(one, x_TD), device, rounds)
            kernels = num_kernels(lambda one=model: pass_through(one, x_TD), device)
            print(
                f"E={num_experts} R={rank} K={top_k} {name:10s} {times[name]:8.3f} ms, {kernels} kernels, "
                f"peak {peak_gib(device):.2f} GiB"
            )
        print(f"lora / PEFT LoRA: {times['lora'] / times['PEFT LoRA']:.2f}; dora / PEFT DoRA: ", end="")
        print(f"{times['dora'] / times['PEFT DoRA']:.2f}")


if __name__ == "__main__":
    main()
