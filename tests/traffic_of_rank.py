"""What a rank really sends in a step: every collective that goes through DeepSpeed's backend, written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import torch

from dsmoelora.config import Recipe
from tests.memory_of_rank import padded_batch

# where a collective has the tensor that is whole: first or second, as input or as output
_WHOLE = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "all_gather": 0,
    "reduce": 0,
    "reduce_scatter": 1,
}
_OPS = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


@dataclass
class Recorder:
    """Collectives, by phase, op and size of the process group: how many, and bytes of their whole tensors."""

    phase: str = "step"
    messages: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    sizes: list[tuple[str, str, int, int]] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Write down what happens inside the block."""
        backend = dist.comm.cdb
        patches = [mock.patch.object(backend, name, self._noted(getattr(backend, name), name)) for name in _WHOLE]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """What happens inside the block belongs to a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def _noted(self, call: Any, name: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            whole = [*args, *kwargs.values()][_WHOLE[name]]
            num_bytes = sum(one.nbytes for one in whole) if isinstance(whole, list) else whole.nbytes
            group_size = torch.distributed.get_world_size(kwargs.get("group"))
            key = (self.phase, _OPS.get(name, name), group_size)
            self.messages[key] += 1
            self.num_bytes[key] += num_bytes
            self.sizes.append((*key, num_bytes))
            return call(*args, **kwargs)

        return noted


def train_and_record(recipe: Recipe, zero: dict[str, Any]) -> Recorder:
    """The fourth step of a run: ZeRO-3 learns the order of the modules in the first two."""
    from dsmoelora.engine import Engine

    engine = Engine.build(recipe, {"zero_optimization": zero})
    batches = [padded_batch(recipe)] * recipe.train.accumulation_steps(dist.get_world_size())
    for _ in range(3):
        engine.train_step(batches)
    found, inner = Recorder(), engine._deepspeed
    forward, backward = inner.forward, inner.backward

    def noted_forward(*args: Any, **kwargs: Any) -> Any:
        with found.of("forward"):
            return forward(*args, **kwargs)

    def noted_backward(*args: Any, **kwargs: Any) -> Any:
        with found.of("backward"):
            return backward(*args, **kwargs)

    with (
        mock.patch.object(inner, "forward", noted_forward),
        mock.patch.object(inner, "backward", noted_backward),
        found.listening(),
    ):
        engine.train_step(batches)
    return found
