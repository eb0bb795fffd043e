"""What the watch over adapter tensors records, and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsmoelora.config import OptimConfig
from dsmoelora.optim import build_optimizer
from dsmoelora.parallel.watch import AdapterWatch
from tests.two_layers import TwoLayers

PLAIN: Any = {"name": "sgd", "lr": 0.5, "lr_router": None, "momentum": 0.0, "weight_decay": 0.0}


def test_a_skipped_step_is_not_recorded() -> None:
    """Where ZeRO does not look at gradients itself, one that is not finite reaches the optimizer and is skipped."""
    optimizer = build_optimizer(TwoLayers(), OptimConfig(**PLAIN))
    watch = AdapterWatch(optimizer)
    watch.start()
    for value in (3.0, math.nan, 4.0):
        for shard in optimizer.shards:
            shard.tensor.grad = torch.full_like(shard.tensor, value)
        optimizer.skip = math.isnan(value)
        optimizer.step()
    sizes = {shard.segments[0].of.name: shard.tensor.numel() for shard in optimizer.shards}
    found = watch.stop()
    assert found.keys() == sizes.keys()
    for name, size in sizes.items():
        assert found[name]["grad_norm"] == pytest.approx(math.sqrt(size * (3.0**2 + 4.0**2)))
        assert found[name]["moved"] == pytest.approx(math.sqrt(size) * 0.5 * (3.0 + 4.0), rel=1e-5)
    assert not watch._start and not watch._grad_square, "a copy of all adapters stays for the rest of the run"
