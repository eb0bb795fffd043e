"""The dtypes that a base can have, and where bf16 is worth having."""

from __future__ import annotations

from typing import Any, Literal

import torch

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Time of torch's matrix products in bf16 against fp32 on a CPU without bf16 instructions (AMD Zen 3, AVX2), by size:
# `python benchmarks/dtypes.py --tokens 128`.
SLOWER_WITHOUT_BF16 = "3 to 250 times"


def has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on units made for them, not emulated."""
    if device.type == "cpu":
        return instruction_set() in ("AMX", "AVX512_BF16", "SVE_BF16", "BF16")
    module: Any = torch.get_device_module(device)
    if device.type == "cuda":  # which by default counts what cards before Ampere emulate
        return module.is_bf16_supported(including_emulation=False)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())


def best_dtype(device: torch.device) -> DtypeName:
    """What `model.dtype: auto` means there. fp16 must be asked for: its range is small."""
    return "bf16" if has_bf16(device) else "fp32"


def instruction_set() -> str:
    """The widest instructions of this CPU that matrix products use: `AMX`, `AVX512_BF16`, `AVX512`, `AVX2`, ..."""
    known = _cpu_capabilities()
    for key in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"):
        if known.get(key):
            return "AMX" if key == "amx_bf16" else key.upper()
    return torch.backends.cpu.get_cpu_capability()


def _cpu_capabilities() -> dict[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    # torch 2.9 says so under private names
    asked = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return {key: getattr(torch.cpu, name)() for key, name in asked.items() if hasattr(torch.cpu, name)}
