"""Which parameters ZeRO-3 has gathered at each moment of a micro-batch: the most at a time, and how many in all.

The rules are those of deepspeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py`, once it knows the order of the
modules (from the third forward pass on): a module's parameters are fetched before it computes; then what comes next is
fetched ahead, `prefetch_bucket_size` numbers at most, as long as fewer than `max_live_parameters` are there; a module's
parameters are let go after it, unless one is needed again within `max_reuse_distance` numbers. Parameters that are
kept whole take no part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import nn

from dsmoelora.planner.shapes import ModelShapes, ParameterShape
from dsmoelora.planner.stand_in import Order


@dataclass(frozen=True)
class Visit:
    """A module begins or ends, forward or backward.

    Args:
        is_begin: or it ends
        parameters: its own
        owns: what it lets go of beside them when it ends
    """

    is_begin: bool
    parameters: tuple[ParameterShape, ...]
    owns: tuple[ParameterShape, ...] = ()


@dataclass(frozen=True)
class GatherRules:
    """Keys of `zero_optimization`, in numbers.

    Args:
        prefetch_bucket_size: `stage3_prefetch_bucket_size`
        max_live_parameters: `stage3_max_live_parameters`
        max_reuse_distance: `stage3_max_reuse_distance`
    """

    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int


@dataclass(frozen=True)
class Gather:
    """One all-gather.

    Args:
        in_backward: it happens in the backward pass, recomputation counted, or in the forward pass
        numel: numbers that come together, padding counted
        num_pieces: ranks that bring them
    """

    in_backward: bool
    numel: int
    num_pieces: int


@dataclass
class Gathered:
    """What a micro-batch gathers.

    Args:
        peak: the most numbers that are there at a time
        gathers: all of them, in order
    """

    peak: int = 0
    gathers: list[Gather] = field(default_factory=list)
    _live: dict[str, ParameterShape] = field(default_factory=dict)

    def fetch(self, parameters: Sequence[ParameterShape], in_backward: bool) -> None:
        """Gather those that are not there, those of a process group at once."""
        absent = {one.name: one for one in parameters if one.name not in self._live}
        self._live |= absent
        for num_pieces in sorted({one.num_pieces for one in absent.values()} - {1}):
            numel = sum(one.padded for one in absent.values() if one.num_pieces == num_pieces)
            self.gathers.append(Gather(in_backward, numel, num_pieces))
        self.peak = max(self.peak, sum(one.padded for one in self._live.values()))

    def release(self, name: str) -> None:
        """Let go of one, if it is there."""
        self._live.pop(name, None)

    def is_there(self, one: ParameterShape) -> bool:
        """Whether it is gathered."""
        return one.name in self._live

    @property
    def live_numel(self) -> int:
        """Numbers that are there, padding left out."""
        return sum(one.numel for one in self._live.values())


def gathered_in_pass(shapes: ModelShapes, order: Order, rules: GatherRules, checkpointing: bool) -> Gathered:
    """Forward and backward pass of one micro-batch.

    Args:
        shapes: of the model
        order: in which modules call their children
        rules: of ZeRO-3
        checkpointing: whether layers are computed again in the backward pass
    """
    walk = _Walk(shapes, order, checkpointing)
    forward, backward = list(walk.forward()), list(walk.backward())
    visits = forward + backward
    begins = [visit.parameters for visit in visits if visit.is_begin]
    past = list(accumulate((sum(one.numel for one in some) for some in begins), initial=0))
    uses: dict[str, list[int]] = {}
    for step, parameters in enumerate(begins):
        for one in parameters:
            uses.setdefault(one.name, []).append(step)
    queue = deque((one, step) for step, parameters in enumerate(begins) for one in parameters)
    seen_until: dict[str, int] = {}
    state, step = Gathered(), 0
    for place, visit in enumerate(visits):
        in_backward = place >= len(forward)
        if visit.is_begin:
            state.fetch(visit.parameters, in_backward)
            _leave_queue(queue, seen_until, [one for one in visit.parameters if seen_until.get(one.name, -1) < step])
            state.fetch(_next_in(queue, seen_until, state, rules), in_backward)
            step += 1
            continue
        for one in visit.parameters:
            is_promised = seen_until.get(one.name, -1) > step
            if not is_promised and not _is_near(uses[one.name], step, past, rules.max_reuse_distance):
                state.release(one.name)
        for one in visit.owns:
            state.release(one.name)
    return state


def _leave_queue(
    queue: deque[tuple[ParameterShape, int]], seen_until: dict[str, int], fetched: list[ParameterShape]
) -> None:
    """What a module has fetched itself is not fetched ahead any more."""
    for _ in fetched:
        if queue:
            one, last = queue.popleft()
            seen_until[one.name] = last


def _next_in(
    queue: deque[tuple[ParameterShape, int]], seen_until: dict[str, int], state: Gathered, rules: GatherRules
) -> list[ParameterShape]:
    """What is fetched ahead."""
    room = min(rules.max_live_parameters - state.live_numel, rules.prefetch_bucket_size)
    ahead: dict[str, ParameterShape] = {}
    while queue and sum(one.numel for one in ahead.values()) < room:
        one, last = queue.popleft()
        seen_until[one.name] = max(seen_until.get(one.name, -1), last)
        if not state.is_there(one):
            ahead[one.name] = one
    return list(ahead.values())


def _is_near(uses: list[int], step: int, past: list[int], distance: int) -> bool:
    """Whether a parameter is used again before `distance` numbers have been."""
    place = bisect_left(uses, step)
    return place < len(uses) and past[uses[place]] - past[step] < distance


class _Walk:
    """Modules with parameters that are gathered, as they begin and end."""

    def __init__(self, shapes: ModelShapes, order: Order, checkpointing: bool) -> None:
        self._shapes, self._order = shapes, order
        self._again = _layers(shapes.model) if checkpointing else set()

    def forward(self) -> Iterator[Visit]:
        """Of a forward pass."""
        yield from self._forward(self._shapes.model)

    def backward(self) -> Iterator[Visit]:
        """Of a backward pass."""
        yield from self._backward(self._shapes.model)

    def _children(self, module: nn.Module) -> list[nn.Module]:
        children = dict(module.named_children())
        names = self._order.get(type(module), [])
        return [children[name] for name in sorted(children, key=lambda name: names.index(name) if name in names else 0)]

    def _forward(self, module: nn.Module, again: bool = False) -> Iterator[Visit]:
        own = self._own(module)
        # what is gathered to compute a layer again stays until the module ends that had it computed
        frozen = [one for one in own if one.trainable is None]
        if own:
            yield Visit(True, own)
        for child in self._children(module):
            yield from self._forward(child, again)
        if own:
            yield Visit(False, tuple(one for one in own if not (again and one in frozen)))

    def _backward(self, module: nn.Module, before: Sequence[nn.Module] = ()) -> Iterator[Visit]:
        """`before`: layers that are computed again once the first module has begun."""
        if isinstance(module, nn.Embedding):  # it gets no gradient
            return
        if module in self._again:
            before = [module]
        own, children = self._own(module), list(reversed(self._children(module)))
        owned: tuple[ParameterShape, ...] = ()
        if own:
            yield Visit(True, own)
        if before and not any(self._has_own(child) for child in children):
            for layer in before:
                yield from self._forward(layer, again=True)
                owned += tuple(one for part in layer.modules() for one in self._own(part) if one.trainable is None)
            before = ()
        for child in children:
            yield from self._backward(child, before)
            before = () if self._has_own(child) else before
        if own:
            yield Visit(False, own, owns=owned)

    def _has_own(self, module: nn.Module) -> bool:
        return any(self._own(part) for part in module.modules())

    def _own(self, module: nn.Module) -> tuple[ParameterShape, ...]:
        parameters = [*module.parameters(recurse=False), *getattr(module, "joined_factors", ())]
        found = (self._shapes.parameters[id(parameter)] for parameter in parameters)
        return tuple(one for one in found if not one.is_kept_whole)


def _layers(model: nn.Module) -> set[nn.Module]:
    """The layers that are computed again: those of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return set(max(lists, key=lambda one: len(list(one)), default=nn.ModuleList()))
