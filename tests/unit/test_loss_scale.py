"""fp16's loss scale, on DeepSpeed's own scaler; `distributed/test_fp16.py` trains with it where a device can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dsmoelora.parallel import loss_scale


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler says what it does where rank 0 is."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)


def engine(scaler: object) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def scaler() -> DynamicLossScaler:
    """Doubles where two steps have passed since the last change, halves at once."""
    return DynamicLossScaler(
        init_scale=1024.0,
        scale_window=2,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        dtype=torch.float16,
    )


def test_a_scale_stays_for_the_length_of_a_step_and_changes_then() -> None:
    held = scaler()
    for overflow, before, after in (*2 * [(False, 1024, 1024)], (False, 1024, 2048), (True, 2048, 1024)):
        with loss_scale.held(engine(held)):
            held.update_scale(overflow)
            assert held.cur_scale == before
        assert held.cur_scale == after


def test_a_step_that_fails_leaves_the_scale_and_the_scaler_as_they_were() -> None:
    held = scaler()
    with pytest.raises(ZeroDivisionError), loss_scale.held(engine(held)):
        held.update_scale(True)
        raise ZeroDivisionError
    assert held.cur_scale == 1024
    held.update_scale(True)
    assert held.cur_scale == 512


def test_what_was_saved_goes_on() -> None:
    first, second = scaler(), scaler()
    for overflow in (True, False, False, False):
        first.update_scale(overflow)
    loss_scale.load_state(engine(second), loss_scale.state(engine(first)))
    first.update_scale(False)
    second.update_scale(False)
    assert (second.cur_scale, second.cur_iter) == (first.cur_scale, first.cur_iter)


def test_without_fp16_there_is_nothing_to_hold() -> None:
    plain = engine(None)
    assert (loss_scale.of(plain), loss_scale.state(plain)) == (1.0, None)
    loss_scale.load_state(plain, {"cur_scale": 2.0})
    with loss_scale.held(plain):
        pass
