"""Which parameters ZeRO-3 has gathered at each moment of a micro-batch: the most at a time, and how many in all.

The rules are those of deepspeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py`, once it knows the order of the
modules (from the third forward pass on): a module's parameters are fetched before it computes, in the backward pass
once for each output that has a gradient; with every fetch what comes next is fetched ahead, `prefetch_bucket_size`
numbers at most, as long as fewer than `max_live_parameters` are there; a module's parameters are let go after it,
unless another module that has begun needs them, or one that follows within `max_reuse_distance` numbers. Parameters
that are kept whole are there at all times. Modules without parameters fetch ahead like all others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import nn

from dsmoelora.adapters.layer import RoutedLinear
from dsmoelora.planner.shapes import ModelShapes, ParameterShape
from dsmoelora.planner.stand_in import Calls


@dataclass(frozen=True)
class Visit:
    """A module begins or ends, forward or backward.

    Args:
        module: its identity
        is_begin: or it ends
        parameters: its own, and those that it reads of others
        recomputed_for: a module whose backward pass has it computed again, and keeps what is frozen to its own end
        recomputed: it ends, and these were kept for it
    """

    module: int
    is_begin: bool
    parameters: tuple[ParameterShape, ...]
    recomputed_for: int | None = None
    recomputed: tuple[ParameterShape, ...] = ()


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
        there: numbers that are there when a module begins, in the forward pass (False) and the backward pass (True)
        gathers: all of them, in order
    """

    there: dict[bool, list[int]] = field(default_factory=lambda: {False: [], True: []})
    gathers: list[Gather] = field(default_factory=list)
    _live: dict[str, ParameterShape] = field(default_factory=dict)
    _users: dict[str, set[int]] = field(default_factory=dict)

    def fetch(self, parameters: Sequence[ParameterShape], in_backward: bool) -> None:
        """Gather those that are not there, those of a process group at once."""
        absent = {one.name: one for one in parameters if not self.is_there(one)}
        self._live |= absent
        for num_pieces in sorted({one.num_pieces for one in absent.values()} - {1}):
            numel = sum(one.padded for one in absent.values() if one.num_pieces == num_pieces)
            self.gathers.append(Gather(in_backward, numel, num_pieces))
        # a piece that is all of a parameter takes the place of the whole
        self.there[in_backward].append(sum(one.padded for one in self._live.values() if one.num_pieces > 1))

    @property
    def peak(self) -> int:
        """The most numbers that are there at a time."""
        return max((numel for passed in self.there.values() for numel in passed), default=0)

    def hold(self, parameters: Iterable[ParameterShape], module: int) -> None:
        """A module that has begun needs them."""
        for one in parameters:
            self._users.setdefault(one.name, set()).add(module)

    def drop(self, parameters: Iterable[ParameterShape], module: int) -> None:
        """It does so no more."""
        for one in parameters:
            self._users.setdefault(one.name, set()).discard(module)

    def release(self, one: ParameterShape) -> None:
        """Let go of one, if no module that has begun needs it."""
        if not self._users.get(one.name):
            self._live.pop(one.name, None)

    def is_there(self, one: ParameterShape) -> bool:
        """Whether it is gathered."""
        return one.is_kept_whole or one.name in self._live

    @property
    def live_numel(self) -> int:
        """Numbers that are there, padding left out."""
        return sum(one.numel for one in self._live.values())


def gathered_in_pass(shapes: ModelShapes, calls: Calls, rules: GatherRules, checkpointing: bool) -> Gathered:
    """Forward and backward pass of one micro-batch.

    Args:
        shapes: of the model
        calls: of the model's modules
        rules: of ZeRO-3
        checkpointing: whether layers are computed again in the backward pass
    """
    walk = _Walk(shapes, calls, checkpointing)
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
            state.hold(visit.parameters, visit.module)
            if visit.recomputed_for is not None:
                state.hold(_frozen(visit.parameters), visit.recomputed_for)
            _leave_queue(queue, seen_until, [one for one in visit.parameters if seen_until.get(one.name, -1) < step])
            state.fetch(_next_in(queue, seen_until, state, rules), in_backward)
            step += 1
            continue
        state.drop((*visit.parameters, *visit.recomputed), visit.module)
        for one in visit.parameters:
            is_promised = seen_until.get(one.name, -1) > step
            if not is_promised and not _is_near(uses[one.name], step, past, rules.max_reuse_distance):
                state.release(one)
        for one in visit.recomputed:
            state.release(one)
    return state


def gradients_in_order(shapes: ModelShapes, calls: Calls) -> list[ParameterShape]:
    """Trained parameters in the order in which a backward pass has made their gradients whole."""
    found: dict[str, ParameterShape] = {}
    for visit in _Walk(shapes, calls, checkpointing=False).backward():
        if not visit.is_begin:
            for one in visit.parameters:
                if one.trainable:
                    found.pop(one.name, None)  # what two modules read is whole when the last of them has ended
                    found[one.name] = one
    return list(found.values())


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
    """Modules, as they begin and end."""

    def __init__(self, shapes: ModelShapes, calls: Calls, checkpointing: bool) -> None:
        self._shapes, self._calls = shapes, calls
        self._again = _layers(shapes.model) if checkpointing else set()
        self._place = {one.name: place for place, one in enumerate(shapes.parameters.values())}
        self._without_gradient = set(self._before_the_first_gradient())

    def forward(self) -> Iterator[Visit]:
        """Of a forward pass."""
        yield from self._forward(self._shapes.model)

    def backward(self) -> Iterator[Visit]:
        """Of a backward pass."""
        yield from self._backward(self._shapes.model)

    def _before_the_first_gradient(self) -> Iterator[int]:
        """Modules that have ended before one begins that is trained, or whose output is made to ask for a gradient."""
        embeddings = {id(module) for module in self._shapes.model.modules() if isinstance(module, nn.Embedding)}
        asks = embeddings if self._calls.num_gradients.get(nn.Embedding) else set()
        for visit in self._forward(self._shapes.model):
            if visit.module in asks or any(one.trainable for one in visit.parameters):
                return
            if not visit.is_begin:
                yield visit.module

    def _children(self, module: nn.Module) -> list[nn.Module]:
        children = dict(module.named_children())
        names = self._calls.order.get(type(module))
        return list(children.values()) if names is None else [children[name] for name in names if name in children]

    def _forward(self, module: nn.Module, recomputed_for: int | None = None) -> Iterator[Visit]:
        parts = (part for child in self._children(module) for part in self._forward(child, recomputed_for))
        if isinstance(module, _LISTS):
            yield from parts
            return
        own = self._own(module)
        yield Visit(id(module), True, own, recomputed_for)
        yield from parts
        yield Visit(id(module), False, own)

    def _backward(self, module: nn.Module, before: Sequence[nn.Module] = ()) -> Iterator[Visit]:
        """`before`: layers that are computed again once the first module has begun."""
        num_fetches = self._calls.num_gradients.get(type(module), 0)
        if id(module) in self._without_gradient or (not num_fetches and not isinstance(module, _LISTS)):
            return
        if module in self._again:
            before = [module]
        own, children = self._own(module), list(reversed(self._children(module)))
        recomputed: tuple[ParameterShape, ...] = ()
        if not isinstance(module, _LISTS):
            yield from [Visit(id(module), True, own)] * num_fetches
        if before and not any(self._has_own(child) for child in children):
            for layer in before:
                yield from _without_last_ends(list(self._forward(layer, recomputed_for=id(module))))
                recomputed += tuple(one for part in layer.modules() for one in _frozen(self._own(part)))
            before = ()
        for child in children:
            yield from self._backward(child, before)
            before = () if self._has_own(child) else before
        if not isinstance(module, _LISTS):
            yield Visit(id(module), False, own, recomputed=recomputed)

    def _has_own(self, module: nn.Module) -> bool:
        return any(self._own(part) for part in module.modules())

    def _own(self, module: nn.Module) -> tuple[ParameterShape, ...]:
        parameters = [*module.parameters(recurse=False), *getattr(module, "joined_parameters", ())]
        if isinstance(module, RoutedLinear):  # it looks at the dtype of this one, which ZeRO-3 takes for a use
            parameters.append(module.base.weight)
        found = {self._shapes.parameters[id(parameter)] for parameter in parameters}
        return tuple(sorted(found, key=lambda one: self._place[one.name]))


_LISTS = (nn.ModuleList, nn.ModuleDict)  # which nobody calls


def _without_last_ends(visits: list[Visit]) -> list[Visit]:
    """torch stops a recomputation when it has the last tensor that is needed, in the midst of the last module."""
    return visits[: max(place for place, visit in enumerate(visits) if visit.is_begin) + 1]


def _frozen(parameters: Iterable[ParameterShape]) -> list[ParameterShape]:
    return [one for one in parameters if one.trainable is None]


def _layers(model: nn.Module) -> set[nn.Module]:
    """The layers that are computed again: those of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return set(max(lists, key=lambda one: len(list(one)), default=nn.ModuleList()))
