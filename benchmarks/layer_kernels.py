"""Kernels of an adapted layer, forward and backward, for every kind of expert and router, beside PEFT's LoRA.

    python benchmarks/layer_kernels.py

Counted by a dispatch mode: operations that only look at memory in another way are left out. The layer is called as the
engine does, with the routers' log on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.routers import BUILDERS
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import LossesConfig

NUM_SEQUENCES, LENGTH, WIDTH = 4, 32, 64
# besides views: memory that is only set aside, and names that only check or pass on
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}


class Kernels(TorchDispatchMode):
    """Counts, inside the block, operations that compute something.

    Attributes:
        names: of them, in their order
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def layer_kernels(
    losses: LossesConfig | None = None, dtype: torch.dtype = torch.float32, **adapter: Any
) -> tuple[list[str], list[str]]:
    """Kernels of a forward and of a backward pass through one layer.

    Args:
        losses: of routers
        dtype: of the model
        adapter: keys of `AdapterConfig`
    """
    device = torch.device("cpu")
    config = AdapterConfig(**{"num_experts": 8, "r": 4, "target_modules": "all-linear"} | adapter)
    model = _linear(dtype)
    inject(model, config)
    context = adapter_context(model)
    keys_BS = torch.arange(NUM_SEQUENCES * LENGTH, dtype=torch.int32).view(NUM_SEQUENCES, LENGTH)
    real_BS = torch.ones_like(keys_BS, dtype=torch.bool)
    context.tokens = BatchTokens(keys_BS, real_BS, prompt_BS=real_BS)
    log = RoutingLog(model, losses or LossesConfig(), device)
    log.begin_step(NUM_SEQUENCES * LENGTH, 1.0)
    context.log = log
    with log.listening():
        return _forward_and_backward(model.train())


def peft_kernels(dtype: torch.dtype = torch.float32) -> tuple[list[str], list[str]]:
    """The same of PEFT's LoRA."""
    config = peft.LoraConfig(r=32, target_modules=["0"])
    return _forward_and_backward(peft.inject_adapter_in_model(config, _linear(dtype)).to(dtype).train())


def _linear(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(dtype).requires_grad_(False)


def _forward_and_backward(model: Any) -> tuple[list[str], list[str]]:
    """Of a layer among many: what is made once for all of them has been made."""
    x_BSD = torch.randn(NUM_SEQUENCES, LENGTH, WIDTH, dtype=next(model.parameters()).dtype, requires_grad=True)
    model(x_BSD)
    with Kernels() as forward:
        y_BSO = model(x_BSD)
    grad_BSO = torch.randn_like(y_BSO)
    with Kernels() as backward:
        y_BSO.backward(grad_BSO)
    return forward.names, backward.names


def main() -> None:
    """Print a table."""

    def line(name: str, counted: tuple[list[str], list[str]]) -> None:
        forward, backward = map(len, counted)
        print(f"{name:44s} forward {forward:3d}  backward {backward:3d}  both {forward + backward:3d}")

    line("PEFT LoRA", peft_kernels())
    line("lora, one expert", layer_kernels(num_experts=1))
    for router in BUILDERS:
        line(f"lora, {router}", layer_kernels(router=router))
    for expert in ("moslora", "dora"):
        line(f"{expert}, softmax_topk", layer_kernels(expert=expert))
    line("lora, softmax_topk, balance and z", layer_kernels(LossesConfig(balance=0.01, z=0.001)))
    line("lora, softmax_topk, dropout", layer_kernels(lora_dropout=0.1))
    line("lora, softmax_topk, gate_power 0.5", layer_kernels(gate_power=0.5))
    line("lora, softmax_topk, bf16", layer_kernels(dtype=torch.bfloat16))


if __name__ == "__main__":
    main()
