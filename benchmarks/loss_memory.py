"""Peak memory and time of the loss over a large vocabulary: all logits at once against chunks of targets.

    python benchmarks/loss_memory.py

A Llama of next to nothing but its head, forward and backward to the hidden states. Memory is what comes on top of the
model and its input.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable

import torch
from machine import DEVICE, DTYPE, setting
from timing import seconds
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoelora.callbacks.memory import PeakMemory
from dsmoelora.model.heap import large_blocks_apart
from dsmoelora.model.output_head import ChunkedLoss

Step = Callable[[], float]


def steps_of(model: LlamaForCausalLM, num_targets: int, size: int) -> tuple[Step, Step]:
    """The loss of all logits at once, and in chunks: each forward and backward, and gives its value."""
    x_BSD = torch.randn(1, num_targets, model.config.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    targets_T = torch.randint(model.config.vocab_size, (num_targets,), device=DEVICE)
    places_BP = torch.arange(num_targets, device=DEVICE).unsqueeze(0)
    chunked = ChunkedLoss.of(model, size)
    assert chunked is not None
    weight = 1.0 / num_targets

    def logits() -> Tensor:
        found: Tensor = model(inputs_embeds=x_BSD, logits_to_keep=places_BP).logits
        return found.flatten(0, 1).float()

    def at_once() -> float:
        x_BSD.grad = None
        nll = nn.functional.cross_entropy(logits(), targets_T, reduction="sum")
        (weight * nll).backward()
        return nll.item()

    def in_chunks() -> float:
        x_BSD.grad = None
        nll = chunked.nll_sum(
            lambda: model(inputs_embeds=x_BSD, logits_to_keep=places_BP), places_BP[0], targets_T, gradient=weight
        )
        (weight * nll).backward()
        return nll.item()

    return at_once, in_chunks


def peak_gib(step: Step) -> float:
    """Of one step, beyond what was there before."""
    gc.collect()
    memory = PeakMemory()
    before = memory.gib()
    memory.start()
    step()
    memory.stop()
    return memory.gib() - before


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states")
    parser.add_argument("--chunk", type=int, default=256, help="targets of a chunk, train.loss_chunk")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sizes = {"hidden_size": args.width, "intermediate_size": 8, "num_attention_heads": 8, "num_hidden_layers": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocabulary, **sizes)).to(DEVICE, DTYPE).requires_grad_(False)
    print(setting())
    with large_blocks_apart():  # freed logits go back to the system at once, so that the peak is that of what is used
        at_once, in_chunks = steps_of(model, args.targets, args.chunk)
        whole, chunked = at_once(), in_chunks()
        peaks = [peak_gib(step) for step in (at_once, in_chunks)]
        ratios = []
        for _ in range(args.rounds):
            time_at_once = seconds(at_once)
            ratios.append(seconds(in_chunks) / time_at_once)
    print(
        f"{args.targets} targets, vocabulary {args.vocabulary:,}, width {args.width}: all at once {peaks[0]:.2f} GiB, "
        f"chunks of {args.chunk} {peaks[1]:.2f} GiB ({peaks[1] / peaks[0]:.0%}), time in chunks / at once "
        f"{statistics.median(ratios):.2f}, losses differ by {abs(whole - chunked) / whole:.1e}"
    )


if __name__ == "__main__":
    main()
