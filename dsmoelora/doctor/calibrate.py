"""What this machine reaches: an entry of `devices.yaml` from products, copies, small operations and all-reduces."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmoelora.adapters import adapter_context, inject
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import AdapterConfig, Recipe
from dsmoelora.config.dtype import DTYPES
from dsmoelora.parallel import comm
from dsmoelora.parallel.dtype import settle_dtype
from dsmoelora.planner.operations import CountOperations

_REPEATS = 5
_GIB = 2**30
_WIDTHS, _WIDE = {"cpu": 768}, 8192  # of a model
_ROWS = {"cpu": 256}
_NUM_WEIGHTS = 4  # more than caches hold
_COPY_MIB, _WIDE_COPY_MIB = {"cpu": 4}, 256
_SEND_MIB, _WIDE_SEND_MIB = {"cpu": 16}, 64
# a model in which nothing takes long but asking for it
_NARROW = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    use_cache=False,
)
_FEW_TOKENS = 16


def calibrate() -> dict[str, Any]:
    """An entry for this machine, the same on all ranks (collective).

    Products and copies have the size of those of a model that the machine can train, for large ones reach more than
    there is in a step. Each figure is the slowest rank's median, while the others compute too.
    """
    device = torch.device(get_accelerator().current_device_name())
    dtype = settle_dtype(Recipe()).recipe.model.dtype
    groups = _groups()
    links = {size: _link(size, group, device) for size, group in groups.items()}
    entry: dict[str, Any] = {
        "memory_gib": round(_memory_gib(device), 2),
        "context_gib": 0.5 if device.type == "cpu" else 1.5,
        "ranks_per_node": _local_ranks(),
        "peak_tflops": _least(_products(device, DTYPES[dtype])),
        "memory_gbs": _least(_copies(device)),
        "host_gbs": _least(_copies_from_host(device)),
        "launch_us": -_least(-_launch_us(device)),
        "overlaps": device.type != "cpu",
        "dtype": dtype,
        "names": [] if device.type == "cpu" else [torch.cuda.get_device_name(device)],
        "source": f"measured by doctor.py --calibrate with {comm.world_size()} ranks, torch {torch.__version__}",
    }
    inside = [link for size, link in links.items() if size <= entry["ranks_per_node"]]
    # the widest group of each kind; where there is none, what the other kind has
    entry["in_node"] = inside[-1] if inside else _alone(links, entry)
    entry["between_nodes"] = list(links.values())[-1] if links else _alone(links, entry)
    return entry


def write_entry(entry: dict[str, Any], path: Path) -> None:
    """Write it to a file that `launch/plan.py --gpu` takes; it bears the file's name."""
    path.write_text(yaml.safe_dump({path.stem: entry}, sort_keys=False), encoding="utf-8")


def _least(own: float) -> float:
    """Of all ranks, with three digits."""
    return float(f"{min(comm.all_gather_objects(own)):.3g}")


def _seconds(work: Callable[[], object]) -> float:
    """Median of one call, the device's queue drained."""
    found = []
    for _ in range(_REPEATS + 1):  # the first makes room and connections
        comm.barrier()
        get_accelerator().synchronize()
        begin = time.perf_counter()
        work()
        get_accelerator().synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 operations a second, of a layer's forward product and that of its input's gradient."""
    width = _WIDTHS.get(device.type, _WIDE)
    x_TD = torch.randn(_ROWS.get(device.type, width), width, device=device).to(dtype)
    weights = [torch.randn(2 * width, width, device=device).to(dtype) for _ in range(_NUM_WEIGHTS)]

    def work() -> None:
        for weight_OD in weights:
            (x_TD @ weight_OD.T) @ weight_OD

    return 2 * 2 * x_TD.numel() * 2 * width * _NUM_WEIGHTS / _seconds(work) / 1e12


def _copies(device: torch.device) -> float:
    """10^9 bytes a second that an operation on single numbers reads and writes."""
    tensor = torch.ones(_COPY_MIB.get(device.type, _WIDE_COPY_MIB) << 18, device=device)
    return 2 * tensor.nbytes / _seconds(lambda: tensor * 2.0) / 1e9


def _copies_from_host(device: torch.device) -> float:
    source = torch.ones(_COPY_MIB.get(device.type, _WIDE_COPY_MIB) << 18)
    if device.type != "cpu":
        source = get_accelerator().pin_memory(source)
    target = torch.empty_like(source, device=device)
    return source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9


def _launch_us(device: torch.device) -> float:
    """Of the host, for an operation as a plan counts them: a narrow model with experts, forward and backward.

    What Python, autograd and views take is shared out among the operations.
    """
    recipe = Recipe(adapter=AdapterConfig(num_experts=8, r=4, top_k=2, target_modules="all-linear"))
    model = AutoModelForCausalLM.from_config(_NARROW)
    inject(model, recipe.adapter)
    model.to(device).train()
    log = adapter_context(model).log = RoutingLog(model, recipe.losses, device)
    ids_BS = torch.zeros(1, _FEW_TOKENS, dtype=torch.int64, device=device)

    def work() -> None:
        model.zero_grad()  # as in a plan, where gradients go as they come
        log.begin_step(_FEW_TOKENS, 1.0)
        with log.listening():
            total = model(ids_BS).logits.sum()
        total.backward()

    with CountOperations() as operations:
        work()
    return 1e6 * _seconds(work) / operations.found.total()


def _memory_gib(device: torch.device) -> float:
    if device.type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return float(total / _local_ranks() / _GIB)
    return float(get_accelerator().total_memory() / _GIB)


def _local_ranks() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", comm.world_size())))


def _groups() -> dict[int, Any]:
    """The first 2, 4, 8 ... ranks, and all of them."""
    num_ranks = comm.world_size()
    sizes = [size for size in (2**power for power in range(1, 20)) if size < num_ranks]
    if num_ranks == 1:
        return {}
    return {size: dist.new_group(list(range(size))) for size in sizes} | {num_ranks: None}


def _link(size: int, group: Any, device: torch.device) -> dict[str, float]:
    """Bandwidth and latency of a hop, from an all-reduce of few numbers and one of many."""
    seconds = []
    many = _SEND_MIB.get(device.type, _WIDE_SEND_MIB) << 18
    for numbers in (1, many):
        tensor = torch.zeros(numbers, device=device)

        def work(tensor: torch.Tensor = tensor) -> None:
            if comm.rank() < size:
                dist.all_reduce(tensor, group=group)

        seconds.append(max(comm.all_gather_objects(_seconds(work))))
    hops = 2 * (size - 1)
    sent = hops / size * 4 * many
    return {
        "bandwidth_gbs": float(f"{sent / max(seconds[1] - seconds[0], 1e-9) / 1e9:.3g}"),
        "latency_us": float(f"{1e6 * seconds[0] / hops:.3g}"),
    }


def _alone(links: dict[int, dict[str, float]], entry: dict[str, Any]) -> dict[str, float]:
    """What one rank can say of links: nothing better than its memory, and a launch."""
    return next(iter(links.values()), {"bandwidth_gbs": entry["memory_gbs"], "latency_us": entry["launch_us"]})
