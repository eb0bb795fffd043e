"""Learning-rate schedules, by transformers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from dsmoelora.config import OptimConfig


def build_schedule(optimizer: Optimizer, config: OptimConfig, num_steps: int) -> LRScheduler:
    """Linear warm-up from 0 over `warmup_steps`, then `schedule` down to `min_lr_ratio * lr` at `num_steps`."""
    warmup = config.warmup_steps
    if config.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    if config.schedule == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, num_steps, min_lr_rate=config.min_lr_ratio
        )
    end = config.lr * config.min_lr_ratio
    if end == config.lr:
        return get_constant_schedule_with_warmup(optimizer, warmup)
    return get_polynomial_decay_schedule_with_warmup(optimizer, warmup, num_steps, lr_end=end, power=1.0)
