"""What 4 bits lose of a base, and what `adapter.init: loftq` gives back before the first step.

    python benchmarks/loftq_start.py --model models/smollm2-135m --data data/demo/eval.jsonl

Prints, for no experts and several numbers of them, what is missing of the weights of their layers with gates 1 / E (a
share of their norm), and the loss on some held-out rows with the gates of the routers. `--target-modules all-linear`
puts them on all linear layers in place of q, k, v and o, which takes minutes a row.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from machine import DEVICE, DTYPE, DTYPE_NAME, setting
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.four_bit import FrozenLinear4bit, unpacked
from dsmoelora.adapters.starts.loftq import LoftqSearch, without
from dsmoelora.config import DataSource, ModelConfig
from dsmoelora.data import load_instructions
from dsmoelora.export.average import mean_loss
from dsmoelora.model import load_tokenizer, loftq_searches, model_for_inference, model_without_weights, pretrained

CASES = ((1, 1, 16), (20, 10, 4), (8, 8, 8), (8, 2, 8))  # experts, of which a token uses, rank
REMEDY = "Run make demo first."


def lost(model: nn.Module, weights: dict[str, Tensor], searches: dict[str, LoftqSearch]) -> float:
    """Norm of what is missing, as a share of the norm of the weights (adapted layers alone)."""
    missing = whole = 0.0
    for name in searches:
        layer: Any = model.get_submodule(name)
        base, own = getattr(layer, "base", layer), searches[name]
        assert isinstance(base, FrozenLinear4bit)
        kept_OD = unpacked(base.weight, base.shape, torch.float32).cpu()
        left_OD = weights[name] - kept_OD
        if own.start is not None:
            left_OD = without(left_OD, own.start, own.config.scale)
        missing, whole = missing + float(left_OD.square().sum()), whole + float(weights[name].square().sum())
    return (missing / whole) ** 0.5


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data", default="data/demo/eval.jsonl")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--target-modules", nargs="+", help="layers with experts; default: q, k, v and o")
    options = parser.parse_args()
    layers = {"target_modules": options.target_modules} if options.target_modules else {}
    transformers.logging.disable_progress_bar()
    described = ModelConfig(path=options.model, dtype=DTYPE_NAME)
    samples = load_instructions([DataSource(options.data)], "--data", load_tokenizer(described), max_length=512)
    base: Any = pretrained(options.model, REMEDY, dtype=DTYPE).eval()
    print(setting())
    print(f"loss of the base in {DTYPE_NAME}: {mean_loss(base.to(DEVICE), samples, options.num_samples):.4f}")
    print("|  E |  K |  R | seconds | lost of the weights | loss |")
    for num_experts, top_k, rank in ((0, 0, 0), *CASES):
        config = AdapterConfig(r=rank or 1, num_experts=num_experts or 1, top_k=top_k or 1, init="loftq", **layers)
        config.loftq_iterations = options.iterations
        searches = loftq_searches(model_without_weights(described), config, DTYPE, DEVICE)
        begin = time.perf_counter()
        prepare = searches if num_experts else {}
        model: Any = model_for_inference(options.model, REMEDY, quantize="nf4", prepare=prepare).eval()
        seconds = time.perf_counter() - begin
        if num_experts:
            inject(model, config, start=give_starts(searches))
        weights = {name: base.get_submodule(name).weight.detach().float().cpu() for name in searches}
        row = f"| {num_experts:2} | {top_k:2} | {rank:2} | {seconds:7.1f} | {lost(model, weights, searches):19.4f}"
        print(f"{row} | {mean_loss(model, samples, options.num_samples):.4f} |", flush=True)


def give_starts(searches: dict[str, LoftqSearch]) -> Any:
    """What sets the factors of an adapted model."""

    @torch.no_grad()
    def give(model: nn.Module) -> None:
        for name, layer in adapted_layers(model):
            start = searches[name].start
            assert start is not None, "its weight was read"
            layer.experts.a.copy_(start.a_EDR)
            layer.experts.b.copy_(start.b_EOR)

    return give


if __name__ == "__main__":
    main()
