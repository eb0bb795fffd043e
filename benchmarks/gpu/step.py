"""A training step of a model of Llama-2-7B's shape on one GPU, beside PEFT's LoRA of equal rank under the same ZeRO-3.

    python -m benchmarks.gpu.step

Random weights, bf16, activation checkpointing, experts on q and v. The share of the device's peak counts what LoRA has
to compute: the frozen weights get no gradient, so a weight costs 2 FLOPs a token forward, 2 backward and 2 again where
it is recomputed; an adapter's 6 and 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import deepspeed
import peft
import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks.gpu.device import chosen, milliseconds, num_kernels, peak_gib
from dsmoelora.config import AdapterConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.engine import Engine
from dsmoelora.model import random_model
from dsmoelora.parallel import comm, ranks, zero
from dsmoelora.parallel.zero_config import keep_whole_what_fits, merge_config

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
TARGETS = ["q_proj", "v_proj"]
DEEPSPEED = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"
Step = Callable[[], object]


def flops(num_frozen: int, num_trained: int, shape: LlamaConfig, num_tokens: int) -> float:
    """Of a step with recomputation on one row: weights, adapters, and causal attention (2 D S a token and layer).

    Args:
        num_frozen: weights that take part in products, embeddings left out
        num_trained: of adapters and routers
        shape: of the model
        num_tokens: S
    """
    attention = 2 * shape.num_hidden_layers * shape.hidden_size * num_tokens  # half of 4 D S, for the mask
    forward = 2 * num_frozen + attention
    backward = 2 * num_frozen + 2 * attention
    return num_tokens * (2 * forward + backward + 8 * num_trained)


def recipe_of(dtype: Any) -> Recipe:
    """One row a step, 20 experts of rank 4."""
    return Recipe(
        model=ModelConfig(dtype=dtype),
        adapter=AdapterConfig(r=4, num_experts=20, top_k=10, target_modules=TARGETS),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(batch_size=1, micro_batch_size=1, activation_checkpointing=True),
    )


def random_row(vocab_size: int, num_tokens: int) -> MicroBatch:
    """Tokens that are all learned."""
    ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids, torch.ones_like(ids), ids, torch.tensor([0]), num_tokens - 1, num_tokens)


def ours(recipe: Recipe, model: Any, config: dict[str, Any], batch: MicroBatch) -> tuple[Step, int]:
    """A step of the engine, and how much it trains."""
    engine = Engine(recipe, config, model, cast(Any, None))  # neither text nor files here
    return lambda: engine.train_step([batch]), engine.num_trainable


def by_peft(recipe: Recipe, model: Any, config: dict[str, Any], batch: MicroBatch) -> tuple[Step, int]:
    """A step of DeepSpeed's engine with PEFT's LoRA of rank E x R and torch's AdamW."""
    rank = recipe.adapter.r * recipe.adapter.num_experts
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=TARGETS))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    merged = merge_config(recipe, config, comm.world_size())
    count = sum(zero.full_numel(parameter) for parameter in trained)
    keep_whole_what_fits(merged, [zero.full_numel(parameter) for parameter in trained], [])
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    engine, *_ = deepspeed.initialize(model=adapted, optimizer=optimizer, model_parameters=trained, config=merged)
    ids = batch.input_ids.to(engine.device)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step, count


def measure(kind: str, num_tokens: int, args: argparse.Namespace) -> None:
    """Print a line about one engine."""
    device = chosen(args.dry_run)
    recipe, config = recipe_of("fp32" if args.dry_run else "bf16"), json.loads(DEEPSPEED.read_text())
    shape = LlamaConfig(**(TINY if args.dry_run else SHAPE), max_position_embeddings=8192)
    torch.manual_seed(0)
    model = random_model(shape, recipe.model, merge_config(recipe, config, comm.world_size()))
    embedded = zero.full_numel(model.get_input_embeddings().weight)
    num_frozen = sum(zero.full_numel(parameter) for parameter in model.parameters()) - embedded
    batch = random_row(shape.vocab_size, num_tokens)
    step, num_trained = {"ours": ours, "peft": by_peft}[kind](recipe, model, config, batch)
    peak_gib(device)
    took = milliseconds(step, device, args.rounds)
    share = flops(num_frozen, num_trained, shape, num_tokens) / (1e-3 * took) / (1e12 * args.peak_tflops)
    print(
        f"{kind:5s} {num_tokens} tokens: {took:.1f} ms, MFU {share:.1%} of {args.peak_tflops:g} TFLOP/s, "
        f"{num_kernels(step, device)} kernels, peak {peak_gib(device):.2f} GiB, {num_trained / 1e6:.2f}M trained",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """One engine a process: two models of 7B would not fit, and DeepSpeed keeps what it knows of the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape in fp32 on the CPU")
    parser.add_argument("--kind", choices=("ours", "peft"), default="ours", help="run it once for each")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device in bf16, dense; an H100's here")
    args = parser.parse_args(arguments)
    chosen(args.dry_run)
    ranks.adopt_launcher_environment()
    comm.init()
    for num_tokens in [16] if args.dry_run else args.tokens:
        measure(args.kind, num_tokens, args)
    comm.shutdown()


if __name__ == "__main__":
    main()
