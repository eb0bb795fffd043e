"""The DeepSpeed file."""

from __future__ import annotations

from typing import Any

from tests.bad_input.bench import Case, override


def zero(stage: int = 3, **keys: Any) -> Case:
    """A DeepSpeed file with these keys in `zero_optimization`."""
    return lambda bench: bench.deepspeed({"zero_optimization": {"stage": stage, **keys}})


EARLY: dict[str, Case] = {
    "the DeepSpeed file does not exist": override("--deepspeed", "ds_configs/zero33.json"),
    "the DeepSpeed file is no JSON": lambda bench: bench.deepspeed('{"zero_optimization": {'),
    "it is no JSON object": lambda bench: bench.deepspeed("[3]"),
    "its `zero_optimization` is no object": lambda bench: bench.deepspeed({"zero_optimization": 3}),
    "it names no ZeRO stage": lambda bench: bench.deepspeed({}),
    "a ZeRO stage that does not exist": zero(4),
    "`ep_size` with ZeRO-2": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 2}}, "--parallel.ep_size", 2, "--dry-run", "--world-size", 2
    ),
    "another batch size than the recipe's": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "train_batch_size": 7}
    ),
    "an optimizer of its own": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}
    ),
    "`fp16` in the DeepSpeed file alone": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}
    ),
    "ZeRO-0 with `bf16`": lambda bench: bench.deepspeed({"zero_optimization": {"stage": 0}}, "--model.dtype", "bf16"),
    "parameters offloaded below ZeRO-3": zero(2, offload_param={"device": "cpu"}),
    "a key that DeepSpeed does not have": lambda bench: bench.deepspeed({"zero_optimisation": {"stage": 3}}),
    "a key of `zero_optimization` that DeepSpeed does not have": zero(3, overlap_com=True),
    "a share of the optimizer that is no number": zero(3, offload_optimizer={"device": "cpu", "ratio": "half"}),
    "a loss scale that is no number": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "fp16": {"loss_scale": "big"}}
    ),
    "a value of `zero_optimization` of the wrong type": zero(3, reduce_bucket_size="big"),
    "optimizer state on NVMe": zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
    "noise in weights on NVMe": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
        *("--optim.flat_noise", 0.05),
    ),
    "a step that does not look at the gradient's norm": zero(2, compute_grad_norm=False),
    "ZeRO++'s quantised weights": zero(3, zero_quantized_weights=True),
    "modules that are fetched as one": zero(3, stage3_module_granularity_threshold=1000),
}
