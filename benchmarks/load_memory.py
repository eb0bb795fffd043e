"""Peak memory of a rank while a model of a billion parameters is loaded into ZeRO-3 partitions.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --quantize      # in 4 bits: packed bytes / W in place of model bytes / W

The model is random and written once, as sharded safetensors, to `.cache/benchmarks`. Measured is RssAnon + RssShmem
(pages of mapped files belong to the system) of the rank that needs most, on 1, 2 and 4 ranks, against
model bytes / W + largest layer + 800 MiB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import DTYPE, DTYPE_NAME, setting
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from worker import ROOT, run_ranks

from dsmoelora.adapters.four_bit import packed_layers
from dsmoelora.callbacks.memory import GIB, PeakMemory
from dsmoelora.config import ModelConfig
from dsmoelora.config.run import QuantizeName
from dsmoelora.model import load_model
from dsmoelora.parallel import comm, zero

FOLDER = ROOT / ".cache" / "benchmarks" / "llama-1b"
SHAPE = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=14, num_attention_heads=16, vocab_size=32000
)
ZERO_3 = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": DTYPE_NAME == "bf16"},
    "train_micro_batch_size_per_gpu": 1,
}
ALLOWANCE_BYTES = 800 * 2**20


def write_model(folder: Path) -> None:
    """Write the random model in bf16, in files of 500 MB."""
    print(f"writing a random model to {folder}")
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(SHAPE).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)


def num_bytes(module: nn.Module) -> int:
    """Bytes of all weights of a module, as they are kept."""
    return sum(DTYPE.itemsize * zero.full_numel(parameter) for parameter in module.parameters())


def num_bytes_unpacked(module: nn.Module) -> int:
    """Bytes of all weights of a module in 16 bits, or as wide as the model is."""
    packed = sum(zero.full_numel(layer.weight) for layer in packed_layers(module).values())
    weights = sum(layer.in_features * layer.out_features for layer in packed_layers(module).values())
    return num_bytes(module) + DTYPE.itemsize * (weights - packed)


def worker(quantize: QuantizeName) -> None:
    """Load on this rank; rank 0 prints the line."""
    memory = PeakMemory()
    memory.start()
    before = memory.gib()
    model = load_model(ModelConfig(path=str(FOLDER), dtype=DTYPE_NAME, quantize=quantize), ZERO_3)
    peaks = comm.gather_objects(memory.gib())
    if comm.world_size() == 1:
        print(setting())
    if peaks is not None:
        largest = max(num_bytes_unpacked(layer) for layer in [*model.model.layers, model.lm_head])
        total = num_bytes(model)
        bound = (total / comm.world_size() + largest + ALLOWANCE_BYTES) / GIB
        verdict = "under" if max(peaks) < bound else "OVER"
        print(
            f"W={comm.world_size()}  model {total / GIB:.2f} GiB  peak of a rank {max(peaks):.2f} GiB "
            f"(before loading {before:.2f})  {verdict} the bound of {bound:.2f} GiB",
            flush=True,
        )


def main() -> None:
    """Write the model if it is not there, then load it on 1, 2 and 4 ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantize", action="store_true", help="keep the linear layers in 4 bits")
    quantize = "nf4" if parser.parse_args().quantize else "none"
    if not (FOLDER / "config.json").exists():
        write_model(FOLDER)
    for world_size in (1, 2, 4):
        run_ranks(__file__, world_size, quantize)


if __name__ == "__main__":
    main()
