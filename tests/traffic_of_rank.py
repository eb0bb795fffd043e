"""What a rank really sends in a step: every collective that goes through DeepSpeed's backend, written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import torch

from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch
from tests.memory_of_rank import padded_batch

# the argument that is the whole tensor and that of the process group, by name and place; what the planner calls it
_HEARD = {
    "all_reduce": (("tensor", 0), 2, "all_reduce"),
    "all_gather_into_tensor": (("output_tensor", 0), 2, "all_gather"),
    "reduce_scatter_tensor": (("input_tensor", 1), 3, "reduce_scatter"),
    "all_to_all_single": (("input", 1), 4, "all_to_all"),
    "broadcast": (("tensor", 0), 2, "broadcast"),
}
Key = tuple[str, str, int]


@dataclass
class Recorder:
    """Collectives, by phase, op and size of the process group: how many, and bytes of their whole tensors."""

    phase: str = "step"
    messages: Counter[Key] = field(default_factory=Counter)
    num_bytes: Counter[Key] = field(default_factory=Counter)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Write down what happens inside the block."""
        backend = dist.comm.cdb
        patches = [mock.patch.object(backend, name, self._noted(getattr(backend, name), name)) for name in _HEARD]
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
        whole, group_place, op = _HEARD[name]

        def noted(*args: Any, **kwargs: Any) -> Any:
            tensor, group = (_argument(args, kwargs, *place) for place in (whole, ("group", group_place)))
            group_size = torch.distributed.get_world_size(group)
            if group_size > 1:
                key = (self.phase, op, group_size)
                self.messages[key] += 1
                self.num_bytes[key] += tensor.nbytes
            return call(*args, **kwargs)

        return noted


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def train_and_record(
    recipe: Recipe, zero: dict[str, Any], look: Callable[[Any], None] = lambda engine: None
) -> Recorder:
    """The fourth step of a run: ZeRO-3 learns the order of the modules in the first two.

    Args:
        recipe: of the run
        zero: section `zero_optimization`
        look: at the engine, before it trains
    """
    from dsmoelora.engine import Engine

    engine = Engine.build(recipe, {"zero_optimization": zero})
    look(engine)
    batches = [padded_batch(recipe) for _ in range(recipe.train.accumulation_steps(dist.get_world_size()))]
    for _ in range(3):
        engine.train_step(batches)
    return recorded_step(engine, batches)


def recorded_step(engine: Any, batches: list[MicroBatch]) -> Recorder:
    """What an engine sends in its next step."""
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
