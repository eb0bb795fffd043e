"""What `adapter.init: svd` costs: the loss before the first step, rounding of the base, seconds.

    python benchmarks/svd_start.py --model models/smollm2-135m --data data/demo/eval.jsonl

Prints, for several numbers of experts, how far the adapted model is from the base on some held-out rows, and the time
of a singular value decomposition by size.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from machine import DTYPE, setting

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters.starts.svd import start_experts, uniform_gates
from dsmoelora.config import DataSource, ModelConfig
from dsmoelora.data import load_instructions
from dsmoelora.export.average import mean_loss
from dsmoelora.model import load_tokenizer, pretrained

CASES = ((1, 1, 16), (2, 2, 8), (8, 8, 8), (20, 10, 4), (8, 2, 8))  # experts, of which a token uses, rank
SIZES = (576, 1152, 2304)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data", default="data/demo/eval.jsonl")
    parser.add_argument("--num-samples", type=int, default=16)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    samples = load_instructions(
        [DataSource(options.data)], "--data", load_tokenizer(ModelConfig(path=options.model)), max_length=512
    )
    base: Any = pretrained(options.model, "Run make demo first.", dtype=DTYPE).eval()
    base_loss = mean_loss(base, samples, options.num_samples)
    print(setting())
    print(f"loss of the base: {base_loss:.4f}")
    print("|  E |  K |  R | lost by rounding | gates 1 / E | gates of the routers |")
    for num_experts, top_k, rank in CASES:
        model, lost = copy.deepcopy(base), []
        config = AdapterConfig(r=rank, num_experts=num_experts, top_k=top_k, init="svd")
        inject(model, config, start=lambda adapted, lost=lost: lost.append(start_experts(adapted)))  # type: ignore[misc]
        with uniform_gates(model):
            even = mean_loss(model, samples, options.num_samples) - base_loss
        routed = mean_loss(model, samples, options.num_samples) - base_loss
        row = f"| {num_experts:2} | {top_k:2} | {rank:2} | {100 * lost[0]:.1f}% | {even:+.3f} | {routed:+.3f} |"
        print(row, flush=True)
    for size in SIZES:
        weight = torch.randn(size, size)
        begin = time.perf_counter()
        torch.linalg.svd(weight, full_matrices=False)
        seconds = time.perf_counter() - begin
        print(f"{size} x {size}: {seconds:.2f} s on {torch.get_num_threads()} threads", flush=True)


if __name__ == "__main__":
    main()
