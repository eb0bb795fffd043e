"""Which settings fit a device, and which of them are fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError, UserError
from dsmoelora.planner.devices import Device
from dsmoelora.planner.memory import memory_of
from dsmoelora.planner.rehearsal import Memo, Rehearsal, rehearse
from dsmoelora.planner.time import Bound, TimePlan, time_of
from dsmoelora.planner.verdict import Verdict, verdict

_MAX_EP_SIZE = 16  # beyond that a rank talks to more others than it has tokens for


@dataclass(frozen=True)
class Choice:
    """What a search may change.

    Args:
        world_size: W
        deepspeed: name of the DeepSpeed file
        micro_batch_size: rows of a rank in a forward
        checkpointing: layers are computed again
        ep_size: ranks that share out the experts
    """

    world_size: int
    deepspeed: str
    micro_batch_size: int
    checkpointing: bool
    ep_size: int

    @staticmethod
    def of(recipe: Recipe, deepspeed: str, world_size: int) -> Choice:
        """What a recipe has."""
        train = recipe.train
        return Choice(
            world_size, deepspeed, train.micro_batch_size, train.activation_checkpointing, recipe.parallel.ep_size
        )

    def put_into(self, recipe: Recipe) -> Recipe:
        """The recipe with it."""
        train = replace(
            recipe.train, micro_batch_size=self.micro_batch_size, activation_checkpointing=self.checkpointing
        )
        return replace(recipe, train=train, parallel=replace(recipe.parallel, ep_size=self.ep_size))

    def overrides(self) -> str:
        """Words for the command line of `launch/train.py`."""
        words = {
            "--deepspeed": self.deepspeed,
            "--train.micro_batch_size": self.micro_batch_size,
            "--train.activation_checkpointing": str(self.checkpointing).lower(),
            "--parallel.ep_size": self.ep_size,
        }
        return " ".join(f"{key} {value}" for key, value in words.items() if value)


@dataclass(frozen=True)
class Candidate:
    """A choice, planned.

    Args:
        choice: of settings
        found: whether it fits
        time: of its steps
        stage: of ZeRO
        offloads: something lies with the host
    """

    choice: Choice
    found: Verdict
    time: TimePlan
    stage: int
    offloads: bool

    def reasons(self) -> str:
        """Why it is as fast as it is."""
        why = [f"{100 * self.found.used:.0f} % of the memory", f"bound by {self.time.bound}"]
        if self.stage < 3:
            why.append("the base is whole, so nothing is gathered")
        if not self.choice.checkpointing:
            why.append("no layer is computed again")
        if self.offloads:
            why.append("what lies with the host comes over its link")
        if self.time.bound is Bound.LAUNCH:
            why.append("a larger micro-batch would cost the host no more")
        return "; ".join(why)


@dataclass
class Search:
    """Plans many choices for one run.

    Args:
        recipe: of the run, with its dtype settled
        files: contents of DeepSpeed files by name
        device: of each rank

    Attributes:
        num_planned: choices that were looked at
        refused: why others cannot be, and how many
    """

    recipe: Recipe
    files: Mapping[str, dict[str, Any]]
    device: Device
    num_planned: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    _memo: Memo = field(default_factory=Memo)

    def best(self, world_sizes: Iterable[int]) -> list[Candidate]:
        """What fits, the cheapest first: the fastest of each number of ranks and DeepSpeed file.

        The global batch, and so what is learned, stays as it is. `ep_size` is looked at for the best of them alone.
        """
        found = []
        for world_size, name in product(world_sizes, self.files):
            own = Choice.of(self.recipe, name, world_size)
            both = [self.largest(replace(own, checkpointing=checkpointing)) for checkpointing in (False, True)]
            found += sorted(filter(None, both), key=lambda one: one.time.step)[:1]
        found.sort(key=_device_seconds)
        if found:
            others = map(self.plan, self._other_ep_sizes(found[0].choice))
            found = sorted([*found, *filter(None, others)], key=_device_seconds)
        return found

    def largest(self, choice: Choice) -> Candidate | None:
        """The choice with the largest micro-batch that fits: smaller ones compute as much, with more launches."""
        sizes = micro_batches(self.recipe, choice.world_size)
        planned = (self.plan(replace(choice, micro_batch_size=size)) for size in sizes)
        return next(filter(None, planned), None)

    def plan(self, choice: Choice) -> Candidate | None:
        """A choice; None where it cannot be, or does not fit, or fits so tightly that what is left out may not."""
        self.num_planned += 1
        try:
            run = self.rehearse(choice)
        except UserError as error:
            self.refused[str(error)] += 1
            return None
        found = verdict(memory_of(run), self.device)
        if not found.fits or found.is_tight:
            return None
        offloads = run.offloads("offload_param") or run.offloads("offload_optimizer")
        return Candidate(choice, found, time_of(run, self.device), run.zero.stage, offloads)

    def rehearse(self, choice: Choice) -> Rehearsal:
        """See `rehearse`."""
        content = self.files[choice.deepspeed]
        return rehearse(choice.put_into(self.recipe), content, choice.world_size, self._memo)

    def _other_ep_sizes(self, best: Choice) -> Iterator[Choice]:
        num_experts = self.recipe.adapter.num_experts
        for size in range(1, min(_MAX_EP_SIZE, num_experts, best.world_size) + 1):
            if size != best.ep_size and best.world_size % size == 0 and num_experts % size == 0:
                yield replace(best, ep_size=size)


def largest_micro_batch(recipe: Recipe, deepspeed: dict[str, Any], world_size: int, device: Device) -> Recipe:
    """The recipe with the largest micro-batch that fits, its global batch as it is.

    Raises:
        UserError: not even one row does, or the settings cannot work together
    """
    found = Search(recipe, {"": deepspeed}, device)
    choice = replace(Choice.of(recipe, "", world_size), micro_batch_size=1)
    smallest = verdict(memory_of(found.rehearse(choice)), device)
    largest = found.largest(choice)
    if largest is None:
        raise ConfigError(
            f"--fit: not even train.micro_batch_size 1 fits {world_size} x {device.name}: {smallest.text}. "
            f"Change what is largest ({smallest.limits[0]}), or see what else there is with --search."
        )
    return largest.choice.put_into(recipe)


def micro_batches(recipe: Recipe, world_size: int) -> Iterator[int]:
    """Rows of a rank in a forward, the largest first: what divides its share of the global batch.

    Raises:
        ConfigError: the ranks do not divide it
    """
    replace(recipe.train, micro_batch_size=1).accumulation_steps(world_size)
    share = recipe.train.batch_size // world_size
    yield from (size for size in range(share, 0, -1) if share % size == 0)


def _device_seconds(one: Candidate) -> tuple[float, float, float]:
    """What a step costs on all devices, to the per cent; where that is equal its time, then the memory."""
    cost = one.time.step * one.choice.world_size
    return float(f"{cost:.2e}"), one.time.step, one.found.used
