"""Learning-rate schedules, by transformers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dsmoelora.config import OptimConfig


def build_schedule(optimizer: Optimizer, config: OptimConfig, num_steps: int, position: int = 0) -> LRScheduler:
    """Linear warm-up from 0 over `warmup_steps`, then `schedule` down to `min_lr_ratio * lr` at `num_steps`.

    Args:
        optimizer: its param group's `lr` is set
        config: of the optimizer
        num_steps: optimizer steps of the whole run
        position: optimizer steps taken already
    """
    # which brings transformers' Trainer with it, and seconds to start: a plan has no schedule
    from transformers import (
        get_constant_schedule_with_warmup,
        get_cosine_with_min_lr_schedule_with_warmup,
        get_polynomial_decay_schedule_with_warmup,
    )

    warmup, last = config.warmup_steps, position - 1
    end = config.lr * config.min_lr_ratio
    num_steps = max(num_steps, warmup + 1)  # a run may end within its warm-up
    if config.schedule == "constant" or end == config.lr:
        return get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=last)
    if config.schedule == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, num_steps, last_epoch=last, min_lr_rate=config.min_lr_ratio
        )
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup, num_steps, lr_end=end, power=1.0, last_epoch=last
    )
