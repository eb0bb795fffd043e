"""What a rank really holds, counted by Python's collector and by torch's own allocator, and what ZeRO gathers."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch

_CALL, _MEASURED_CALLS = "measured call", 3


@dataclass(frozen=True)
class Held:
    """Of one rank.

    Args:
        at_rest: bytes of all tensors that an engine brings, between two steps
        peak: bytes that are allocated beside them in a step, at most
        gathered_peak: numbers that ZeRO-3 has gathered at most
    """

    at_rest: int
    peak: int
    gathered_peak: int


def train_and_measure(recipe: Recipe, zero: dict[str, Any]) -> Held:
    """Three steps of one micro-batch: ZeRO-3 learns the order of the modules in the first two."""
    from dsmoelora.engine import Engine

    before = [weakref.ref(tensor) for tensor in _tensors()]
    engine = Engine.build(recipe, {"zero_optimization": zero})
    batch = padded_batch(recipe)
    for _ in range(3):
        engine.train_step([batch])
    # an engine before this one may have left some that are gone by now
    at_rest = bytes_of_tensors([tensor for one in before if (tensor := one()) is not None])
    coordinator = getattr(engine._deepspeed.optimizer, "_get_param_coordinator", lambda: None)()
    with _Gathering(coordinator) as gathering:
        peak = allocated_peak(lambda: engine.train_step([batch]))
    return Held(at_rest, peak, gathering.peak)


def padded_batch(recipe: Recipe) -> MicroBatch:
    """Full rows but for the last token of the first, so that there is a mask; all tokens are targets."""
    from dsmoelora.parallel import comm

    num_rows, length = recipe.train.micro_batch_size, recipe.data.max_length
    mask_BS = torch.ones(num_rows, length, dtype=torch.int64)
    mask_BS[0, -1] = 0
    ids_BS = torch.arange(num_rows * length).view(num_rows, length) % 200
    total = comm.world_size() * num_rows * length
    return MicroBatch(ids_BS, mask_BS, ids_BS, torch.arange(num_rows), total, total)


def allocated_peak(run: Any) -> int:
    """The most bytes that torch's allocator of the CPU has given out inside the call, beside what it had.

    The call is made once unmeasured, for the allocator cannot tell the size of what it gave out unobserved and gets
    back. Of the others the least counts: on a busy machine gloo's threads come late to let go of what they have sent.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
        for _ in range(_MEASURED_CALLS):
            with record_function(_CALL):
                run()
    events = found.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    begins = sorted(event.start_ns() for event in events if event.name() == _CALL)
    peaks = []
    for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
        within = [num_bytes for start, num_bytes in memory if begin <= start < end]
        peaks.append(max(accumulate(within, initial=0)))
    return min(peaks)


def bytes_of_tensors(without: Iterable[torch.Tensor] = ()) -> int:
    """Of all tensors that Python knows of, but for those that lie where one of `without` does."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors()}
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [one for one in gc.get_objects() if type(one) in kinds and one.device.type == "cpu"]


class _Gathering:
    """Watches DeepSpeed's coordinator inside the block."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self.peak = 0

    def __enter__(self) -> _Gathering:
        if self._coordinator is None:
            return self
        fetch = self._coordinator.fetch_sub_module
        name = "_PartitionedParameterCoordinator__n_available_params"

        def fetched(*args: Any, **kwargs: Any) -> None:
            fetch(*args, **kwargs)
            self.peak = max(self.peak, getattr(self._coordinator, name))

        self._coordinator.fetch_sub_module = fetched
        return self

    def __exit__(self, *_: Any) -> None:
        if self._coordinator is not None:
            del self._coordinator.fetch_sub_module
