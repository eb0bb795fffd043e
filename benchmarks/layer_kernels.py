"""Kernels of an adapted layer, and the bytes it keeps, for every kind of expert and router, beside PEFT's LoRA.

    python benchmarks/layer_kernels.py

Kernels are counted by a dispatch mode: operations that only look at memory in another way are left out. Bytes are those
that the backward pass of a layer needs for a token, beside the layer's input and the parameters. The layer is called as
the engine does, with the routers' log on; what that does once for all layers has a line of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.routers import BUILDERS
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import LossesConfig

NUM_SEQUENCES, LENGTH, WIDTH = 4, 32, 64
NUM_EXPERTS, RANK = 8, 4
# besides views: memory that is only set aside, numbers of the host, and names that only check or pass on
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "scalar_tensor",
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


@dataclass(frozen=True)
class Cost:
    """Of one layer.

    Args:
        forward: kernels
        backward: kernels
        kept_bytes: a token
    """

    forward: list[str]
    backward: list[str]
    kept_bytes: float

    def __str__(self) -> str:
        forward, backward = len(self.forward), len(self.backward)
        kernels = f"kernels: forward {forward:3d}, backward {backward:3d}, both {forward + backward:3d}"
        return f"{kernels}; kept: {self.kept_bytes:5.0f} bytes a token"


def layer_cost(losses: LossesConfig | None = None, dtype: torch.dtype = torch.float32, **adapter: Any) -> Cost:
    """Of a forward and a backward pass through one layer.

    Args:
        losses: of routers
        dtype: of the model
        adapter: keys of `AdapterConfig`
    """
    device = torch.device("cpu")
    config = AdapterConfig(**{"num_experts": NUM_EXPERTS, "r": RANK, "target_modules": "all-linear"} | adapter)
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


def log_cost(num_layers: int, losses: LossesConfig | None = None) -> list[str]:
    """Kernels of the routers' log for all layers of a model together, when a forward pass is over."""
    model = nn.Sequential(*(_linear(torch.float32)[0] for _ in range(num_layers)))
    inject(model, AdapterConfig(num_experts=NUM_EXPERTS, r=RANK, target_modules="all-linear"))
    x_BSD = torch.randn(NUM_SEQUENCES, LENGTH, WIDTH)
    context = adapter_context(model)
    context.tokens = BatchTokens(real_BS=torch.ones(NUM_SEQUENCES, LENGTH, dtype=torch.bool))
    log = context.log = RoutingLog(model.train(), losses or LossesConfig(), torch.device("cpu"))
    log.begin_step(NUM_SEQUENCES * LENGTH, 1.0)
    with Kernels() as kernels, log.listening():
        model(x_BSD)
        kernels.names.clear()
    return kernels.names


def peft_cost(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Cost:
    """The same of PEFT's LoRA of rank E R."""
    config = peft.LoraConfig(r=NUM_EXPERTS * RANK, target_modules=["0"], lora_dropout=dropout)
    return _forward_and_backward(peft.inject_adapter_in_model(config, _linear(dtype)).to(dtype).train())


def _linear(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(dtype).requires_grad_(False)


def _forward_and_backward(model: Any) -> Cost:
    """Of a layer among many: what is made once for all of them has been made."""
    x_BSD = torch.randn(NUM_SEQUENCES, LENGTH, WIDTH, dtype=next(model.parameters()).dtype, requires_grad=True)
    model(x_BSD)
    with Kernels() as forward:
        y_BSO = model(x_BSD)
    grad_BSO = torch.randn_like(y_BSO)
    with Kernels() as backward:
        y_BSO.backward(grad_BSO)
    return Cost(forward.names, backward.names, _kept_bytes(model, x_BSD))


def _kept_bytes(model: Any, x_BSD: Tensor) -> float:
    """A token, beside the input, the parameters and what all layers share."""
    free = {tensor.untyped_storage().data_ptr() for tensor in (x_BSD, *model.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free and len(tensor) >= NUM_SEQUENCES:  # not a number of the layer
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_BSO = model(x_BSD)
    del y_BSO
    return sum(kept.values()) / (NUM_SEQUENCES * LENGTH)


def main() -> None:
    """Print a table."""

    def line(name: str, cost: Cost) -> None:
        print(f"{name:38s} {cost}")

    print(f"E = {NUM_EXPERTS}, R = {RANK}, fp32 where nothing else is said")
    line("PEFT LoRA of rank E R", peft_cost())
    line("PEFT LoRA of rank E R, bf16", peft_cost(torch.bfloat16))
    line("PEFT LoRA of rank E R, dropout", peft_cost(dropout=0.1))
    line("lora, one expert", layer_cost(num_experts=1))
    for router in BUILDERS:
        line(f"lora, {router}", layer_cost(router=router))
    for expert in ("moslora", "dora"):
        line(f"{expert}, softmax_topk", layer_cost(expert=expert))
    line("lora, softmax_topk, balance and z", layer_cost(LossesConfig(balance=0.01, z=0.001)))
    line("lora, softmax_topk, dropout", layer_cost(lora_dropout=0.1))
    line("lora, softmax_topk, gate_power 0.5", layer_cost(gate_power=0.5))
    line("lora, softmax_topk, bf16", layer_cost(dtype=torch.bfloat16))
    for name, losses in (
        ("the log of all layers", None),
        ("... with balance and z", LossesConfig(balance=0.01, z=0.001)),
    ):
        print(f"{name:38s} kernels: {len(log_cost(20, losses))} once a forward")


if __name__ == "__main__":
    main()
