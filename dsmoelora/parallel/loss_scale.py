"""fp16's loss scale: what it is, what it has come to, and that it stays for the length of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def of(engine: deepspeed.DeepSpeedEngine) -> float:
    """What fp16 multiplies the loss by in `backward`, for `step` to divide gradients by it again; 1 without fp16."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def state(engine: deepspeed.DeepSpeedEngine) -> dict[str, float] | None:
    """What it has come to and how near it is to its next change; None where it is not adapted."""
    scaler = _adapted(engine)
    return None if scaler is None else {name: getattr(scaler, name) for name in _STATE}


def load_state(engine: deepspeed.DeepSpeedEngine, state: dict[str, float] | None) -> None:
    """Go on with a loss scale; a run that adapts none, or a checkpoint without one, leaves all as it is."""
    scaler = _adapted(engine)
    if state is None or scaler is None:
        return
    for name in _STATE:
        setattr(scaler, name, state[name])


@contextmanager
def held(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside the block the scale stays as it is; what it shall become is told to it at the end.

    DeepSpeed changes it in the midst of a step and then divides by the new one what was multiplied by the old: in
    every step that raises it gradients, their norm, or both would come out halved.
    """
    scaler = _adapted(engine)
    if scaler is None:
        yield
        return
    overflows: list[bool] = []
    scaler.update_scale = overflows.append
    try:
        yield
    finally:
        del scaler.update_scale
    for overflow in overflows:
        scaler.update_scale(overflow)


def _adapted(engine: deepspeed.DeepSpeedEngine) -> DynamicLossScaler | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None
