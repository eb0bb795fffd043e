"""Which rank holds which experts, what does not divide, and which way of the tokens is the cheaper one."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from dsmoelora.config import AdapterConfig, ParallelConfig, Recipe
from dsmoelora.errors import ConfigError
from dsmoelora.parallel import zero_config
from dsmoelora.parallel.exchange import TokenExchange, all_to_all_bytes, gather_bytes
from dsmoelora.parallel.placement import ExpertPlacement, check_placement
from dsmoelora.parallel.zero import make_placement
from dsmoelora.parallel.zero_config import merge_config


def recipe_with(num_experts: int, ep_size: int) -> Recipe:
    return Recipe(adapter=AdapterConfig(num_experts=num_experts, top_k=2), parallel=ParallelConfig(ep_size))


@pytest.mark.parametrize(("world_size", "ep_size", "num_experts"), [(8, 2, 6), (6, 3, 12), (4, 4, 4), (3, 1, 5)])
def test_an_expert_parallel_group_is_neighbours_and_has_every_expert_once(
    world_size: int, ep_size: int, num_experts: int
) -> None:
    placements = [ExpertPlacement(num_experts, ep_size, world_size, rank) for rank in range(world_size)]
    for first in range(0, world_size, ep_size):
        held = [expert for placement in placements[first : first + ep_size] for expert in placement.local_experts]
        assert held == list(range(num_experts))
    for rank, placement in enumerate(placements):
        assert placement.local_experts == placements[rank % ep_size].local_experts, (
            "those of its expert-data-parallel group"
        )


def test_experts_that_do_not_divide_are_refused_with_what_does() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_with(num_experts=20, ep_size=8)
    for words in ("parallel.ep_size", "8", "adapter.num_experts = 20", "1, 2, 4, 5, 10, 20"):
        assert words in str(caught.value)


def test_ranks_that_do_not_divide_are_refused_with_what_does() -> None:
    with pytest.raises(ConfigError) as caught:
        check_placement(recipe_with(num_experts=20, ep_size=4), world_size=6)
    for words in ("parallel.ep_size", "4", "adapter.num_experts = 20", "ranks = 6", "Possible here: 1, 2."):
        assert words in str(caught.value)
    for ep_size in (1, 2):
        check_placement(recipe_with(num_experts=20, ep_size=ep_size), world_size=6)


def test_one_process_has_all_experts_and_can_have_no_partner() -> None:
    assert make_placement(recipe_with(num_experts=6, ep_size=1)).local_experts == range(6)
    with pytest.raises(ConfigError, match="ranks = 1"):
        make_placement(recipe_with(num_experts=6, ep_size=2))


def test_partitioned_experts_want_stage_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_config, "check_version", lambda stage: None)  # which would have its say on stage 2 first
    recipe = recipe_with(num_experts=4, ep_size=2)
    with pytest.raises(ConfigError) as caught:
        merge_config(recipe, {"zero_optimization": {"stage": 2}}, world_size=4)
    for words in ("zero_optimization.stage", "2", "parallel.ep_size is 2", "zero3.json"):
        assert words in str(caught.value)
    merge_config(recipe, {"zero_optimization": {"stage": 3}}, world_size=4)


SIZES = [(6, 2, 2), (6, 3, 1), (8, 4, 3), (6, 2, 5), (4, 4, 4)]  # E, P, K


def share_wanted(num_experts: int, ep_size: int, top_k: int, num_layers: int) -> float:
    """How likely one of several layers chooses at least one of the first E / P experts, by trying all choices."""
    own = set(range(num_experts // ep_size))
    choices = [bool(own & set(choice)) for choice in combinations(range(num_experts), top_k)]
    tries = [any(each) for each in product(choices, repeat=num_layers)]
    return sum(tries) / len(tries)


@pytest.mark.parametrize(("num_experts", "ep_size", "top_k"), SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_bytes_are_those_of_the_formulas(num_experts: int, ep_size: int, top_k: int, num_layers: int) -> None:
    placement = ExpertPlacement(num_experts, ep_size, ep_size, 0)
    tokens, d, o, itemsize = 10, 7, 5, 2
    gates_and_outputs = num_layers * (4 * num_experts // ep_size + o * itemsize)
    assert gather_bytes(tokens, placement, d, o, itemsize, num_layers) == pytest.approx(
        ep_size * tokens * (d * itemsize + gates_and_outputs)
    )
    once, any_layer = (share_wanted(num_experts, ep_size, top_k, count) for count in (1, num_layers))
    rows = any_layer * d * itemsize + once * gates_and_outputs + once * 4 * (num_layers - 1)
    # an int32 for each rank, told to all ranks: of rows and, after the first layer, of those that are not there yet
    counts = 4 * ep_size * (2 * num_layers - 1)
    found = all_to_all_bytes(tokens, placement, d, o, itemsize, top_k, num_layers)
    assert found == pytest.approx(ep_size * (tokens * rows + counts))


def chosen(kind: Any, num_experts: int, ep_size: int, top_k: int) -> str:
    exchange = TokenExchange(ExpertPlacement(num_experts, ep_size, ep_size, 0), kind, top_k)
    exchange.num_tokens = [512] * ep_size
    return exchange.kind_for(64, 32, itemsize=2)


def test_auto_takes_the_way_with_fewer_bytes_and_the_others_are_what_they_say() -> None:
    for sizes in SIZES:
        assert chosen("gather", *sizes) == "gather"
        assert chosen("all_to_all", *sizes) == "all_to_all"
        spares_a_rank = share_wanted(*sizes, num_layers=1) < 1.0  # a token may have no expert there
        assert chosen("auto", *sizes) == ("all_to_all" if spares_a_rank else "gather")
    assert {chosen("auto", *sizes) for sizes in SIZES} == {"gather", "all_to_all"}
