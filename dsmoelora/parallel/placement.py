"""Which rank holds which experts: DeepSpeed's expert-parallel and expert-data-parallel groups.

With W ranks and `ep_size` P, ranks `[k P, (k + 1) P)` are an expert-parallel group: together they hold all E experts,
E/P each, and exchange tokens. Ranks `r, r + P, r + 2 P, ...` hold the same experts; they are an expert-data-parallel
group, over which ZeRO-3 partitions these experts. Routers, and layers with one expert (plain LoRA), lie on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.config import Recipe
from dsmoelora.errors import bad_value, listing
from dsmoelora.optim.rows import Trainable


@dataclass(frozen=True)
class ExpertPlacement:
    """Place of this rank and of its experts.

    Args:
        num_experts: of every layer with a router, shared ones included (with these P is 1)
        ep_size: P, ranks over which the experts of a layer are partitioned
        world_size: W
        rank: of this process
        expert_group: process group of the P ranks that hold all experts together; None where P is 1
        expert_data_group: process group of the W/P ranks that hold the same experts; None where P is 1
    """

    num_experts: int
    ep_size: int
    world_size: int
    rank: int
    expert_group: Any = None
    expert_data_group: Any = None

    @property
    def num_local_experts(self) -> int:
        """L = E / P."""
        return self.num_experts // self.ep_size

    @property
    def ep_rank(self) -> int:
        """Place of this rank among the P ranks of its expert-parallel group."""
        return self.rank % self.ep_size

    @property
    def local_experts(self) -> range:
        """The experts of every layer with a router that this rank holds."""
        first = self.ep_rank * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def experts_of(self, trainable: Trainable) -> range:
        """What this rank holds of a tensor's first dim: all of it for routers and for layers with one expert."""
        num_experts = trainable.shape[0]
        return range(num_experts) if trainable.factor is Factor.ROUTER or num_experts == 1 else self.local_experts

    @property
    def group_name(self) -> str:
        """DeepSpeed's name for the groups."""
        return f"ep_size_{self.ep_size}"


def check_placement(recipe: Recipe, world_size: int) -> None:
    """See that the experts and the ranks of a run divide by `parallel.ep_size`.

    Raises:
        ConfigError: naming the sizes that do
    """
    ep_size, num_experts = recipe.parallel.ep_size, recipe.adapter.num_experts
    if world_size % ep_size == 0 and num_experts % ep_size == 0:
        return
    allowed = [size for size in range(1, world_size + 1) if world_size % size == 0 and num_experts % size == 0]
    raise bad_value(
        "parallel.ep_size",
        ep_size,
        f"a divisor of both adapter.num_experts = {num_experts} and the number of ranks = {world_size}",
        f"Possible here: {listing([str(size) for size in allowed], limit=20)}.",
    )
