"""Seconds of a preconditioned optimizer step on one shard, beside PEFT's loop over pairs and torch's fused AdamW.

    python benchmarks/optimizer_step.py

One thread, one run; everything in turn, round by round, medians of ratios. `D = O`; the shard holds all layers.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from machine import DEVICE, DTYPE, DTYPE_NAME, setting
from peft.optimizers.riemannian import _RiemannianPreconditioner
from timing import seconds
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora.adapters import Factor, inject
from dsmoelora.config import AdapterConfig, OptimConfig
from dsmoelora.optim import Segment, Shard, ShardGroup, ShardOptimizer, Trainable, trainables

Work = Callable[[], object]


def factors(num_layers: int, num_experts: int, size: int, rank: int) -> list[Trainable]:
    """The factors of equal layers, roles side by side, as `trainables` orders them."""
    return [
        Trainable(f"{layer}.{factor.value}", str(layer), factor, (num_experts, size, rank))
        for factor in (Factor.A, Factor.B)
        for layer in range(num_layers)
    ]


def one_shard(tensors: list[Trainable], device: torch.device) -> Shard:
    """A flat shard of random tensors, with a random gradient."""
    segments, offset = [], 0
    for of in tensors:
        numel = math.prod(of.shape)
        segments.append(Segment(of, 0, numel, offset))
        offset += numel
    flat = torch.randn(offset, device=device) / 50
    flat.grad = torch.randn(offset, device=device) / 50
    return Shard(flat, segments)


def bound_optimizer(shard: Shard, preconditioner: str) -> ShardOptimizer:
    """Our optimizer on the shard, as the engine binds it under ZeRO."""
    config = OptimConfig(preconditioner=preconditioner)  # type: ignore[arg-type]
    optimizer = ShardOptimizer([(segment.of, nn.Parameter(torch.empty(0))) for segment in shard.segments], config)
    optimizer.param_groups[0]["params"] = [shard.tensor]
    optimizer.bind([ShardGroup([segment.of for segment in shard.segments], [shard])])
    return optimizer


def peft_pairs(shard: Shard) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The same factors as PEFT holds them: A (R, D) and B (O, R) of every expert, with gradients."""
    whole = {segment.of.name: segment for segment in shard.segments}

    def parts(segment: Segment) -> list[tuple[Tensor, Tensor]]:
        value, grad = shard.tensor[segment.span].view(segment.of.shape), shard.tensor.grad
        assert grad is not None
        return list(zip(value, grad[segment.span].view(segment.of.shape), strict=True))

    pairs = []
    for segment in shard.segments:
        if segment.of.factor is Factor.A:
            for (a, grad_a), (b, grad_b) in zip(parts(segment), parts(whole[f"{segment.of.layer}.b"]), strict=True):
                lora_a, lora_b = nn.Parameter(a.T.contiguous()), nn.Parameter(b.clone())
                lora_a.grad, lora_b.grad = grad_a.T.contiguous(), grad_b.clone()
                pairs.append((lora_a, lora_b))
    return pairs


def compare(num_layers: int, num_experts: int, size: int, rank: int, rounds: int) -> None:
    """Print the medians of one configuration."""
    device = DEVICE
    torch.manual_seed(0)
    shard = one_shard(factors(num_layers, num_experts, size, rank), device)
    numbers = shard.tensor.numel()
    scaled, tangent, plain = (bound_optimizer(shard, name) for name in ("scaled", "tangent", "none"))
    adamw = torch.optim.AdamW([shard.tensor], fused=True)
    peft = _RiemannianPreconditioner(peft_pairs(shard), reg=1e-2)
    work: dict[str, Work] = {
        "scaled alone": scaled._group_steps[shard.tensor].apply,
        "tangent alone": tangent._group_steps[shard.tensor].apply,
        "PEFT's loop": peft.step,
        "step none": plain.step,
        "step scaled": scaled.step,
        "step tangent": tangent.step,
        "torch AdamW": adamw.step,
    }
    gradient = shard.tensor.grad
    assert gradient is not None
    start = gradient.clone()
    times: dict[str, list[float]] = {name: [] for name in work}
    for one_round in range(rounds + 2):
        for name, segment in work.items():
            gradient.copy_(start)  # preconditioning again and again would overflow
            taken = seconds(segment)
            if one_round >= 2:
                times[name].append(taken)

    def ratio(top: str, bottom: str) -> float:
        return statistics.median(t / b for t, b in zip(times[top], times[bottom], strict=True))

    print(f"\nD = O = {size}, R = {rank}, E = {num_experts}, {num_layers} layers: {numbers / 1e6:.1f}M numbers")
    for name, taken in times.items():
        print(f"  {name:14s} {1e3 * statistics.median(taken):8.1f} ms")
    print(f"  PEFT's loop / scaled alone: {ratio(chr(80) + 'EFT' + chr(39) + 's loop', 'scaled alone'):.1f}")
    for name in ("step none", "step scaled", "step tangent"):
        print(f"  {name} / torch's fused AdamW: {ratio(name, 'torch AdamW'):.1f}")
    # a Gram and a product with an R x R matrix: 2 R flops a number each; one reading for the Gram, then gradient in
    # and out for the product; AdamW reads value, gradient and two moments and writes three of them
    print(f"  {4 * rank} flops and 12 bytes a number for `scaled`, 28 bytes for AdamW")


def share_of_demo_step(model_path: Path) -> None:
    """Print what the preconditioner takes of a training step of the demo, one rank doing all of it."""
    device = DEVICE
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPE).to(device)
    inject(model, AdapterConfig())
    ids = torch.randint(1000, (16, 67), device=device)  # the demo's batch and mean length
    shard = one_shard([of for of, _ in trainables(model)], device)
    optimizer = bound_optimizer(shard, "scaled")
    apply = optimizer._group_steps[shard.tensor].apply
    training = statistics.median(seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()) for _ in range(3))
    preconditioning = statistics.median(seconds(apply) for _ in range(3))
    print(
        f"\ndemo in {DTYPE_NAME}, one rank: forward + backward {training:.2f} s, "
        f"`scaled` {1e3 * preconditioning:.0f} ms: {100 * preconditioning / (training + preconditioning):.1f}% of both"
    )


def main() -> None:
    """Two sizes: experts of a 7B model, and those of the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--demo-model", type=Path, default=Path("models/smollm2-135m"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(setting("fp32"))
    compare(num_layers=32, num_experts=8, size=4096, rank=16, rounds=args.rounds)
    compare(num_layers=120, num_experts=20, size=576, rank=4, rounds=args.rounds)
    if args.demo_model.exists():
        share_of_demo_step(args.demo_model)
    else:
        print(f"\nno {args.demo_model}, so no share of a training step: launch/prepare_demo.py makes it")


if __name__ == "__main__":
    main()
