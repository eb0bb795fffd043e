"""Models with weights as four bits leave them, made without any code of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dequantised(base: Path, folder: Path) -> Path:
    """The same model with each linear layer's weight rounded to NF4 and back, by bitsandbytes' own functions."""
    from bitsandbytes import functional

    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            code, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
            tensors[name] = functional.dequantize_4bit(code, state).view_as(weight)
            assert not torch.equal(tensors[name], weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
