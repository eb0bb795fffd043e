"""What a figure is measured on, and the dtype that this machine computes in: what `model.dtype: auto` is."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from dsmoelora.config.dtype import DTYPES, DtypeName, best_dtype, instruction_set

DEVICE = torch.device(get_accelerator().current_device_name())
DTYPE_NAME: DtypeName = best_dtype(DEVICE)
DTYPE = DTYPES[DTYPE_NAME]


def setting(dtype: DtypeName = DTYPE_NAME) -> str:
    """The line above a benchmark's figures, e.g. `AMD EPYC (AVX2), 1 thread a process, fp32, torch 2.13.0`."""
    if DEVICE.type == "cpu":
        threads = torch.get_num_threads()
        where = f"{_cpu_name()} ({instruction_set()}), {threads} thread{'s' * (threads > 1)} a process"
    else:
        where = get_accelerator().get_device_name() if DEVICE.type != "cuda" else torch.cuda.get_device_name()
    return f"{where}, {dtype}, torch {torch.__version__}"


def _cpu_name() -> str:
    """The model's name where Linux tells it, else the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
