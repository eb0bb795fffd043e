"""What a step of the optimizer launches, sends and waits for, with few and with many layers and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layer_kernels import Kernels
from dsmoelora.adapters import Factor
from dsmoelora.optim import OptimConfig, Shard, ShardGroup, ShardOptimizer, Trainable
from dsmoelora.optim.rows import rows_cut_by
from tests.host_waits import host_reads
from tests.shardings import Segments, one_buffer, per_parameter, replicated

SIZES = {"q": (48, 32), "down": (64, 48)}  # D, O
RANK = 4
Cut = Callable[[list[Trainable], int], list[Segments]]


def tensors_of(num_layers: int, num_experts: int, mixers: bool) -> list[Trainable]:
    """Factors and routers of layers of two shapes, in the order of `trainables`."""
    found = []
    for layer in (f"{number}.{name}" for number in range(num_layers) for name in SIZES):
        num_inputs, num_outputs = SIZES[layer.split(".")[1]]
        shapes = {Factor.A: (num_inputs, RANK), Factor.B: (num_outputs, RANK), Factor.ROUTER: (num_inputs,)}
        if mixers:
            shapes[Factor.M] = (RANK, RANK)
        found += [Trainable(f"{layer}.{of.value}", layer, of, (num_experts, *shape)) for of, shape in shapes.items()]
    return sorted(found, key=lambda one: (one.factor.value, one.shape))


@dataclass
class Costs:
    """Of one step on one rank: kernels, all-reduces, and what the host waited for."""

    num_kernels: int
    num_all_reduces: int
    reads: list[str]


def costs_of_a_step(
    config: OptimConfig, cut: Cut, place: tuple[int, int], num_layers: int, num_experts: int, mixers: bool = False
) -> Costs:
    """The second step of the rank `place[0]` of `place[1]`."""
    tensors, (rank, world_size) = tensors_of(num_layers, num_experts, mixers), place
    layout = cut(tensors, world_size)
    factors = {of.name: of for of in tensors if of.factor in (Factor.A, Factor.B)}
    cuts = sorted({row for runs_of_rank in layout for segments in runs_of_rank for row in rows_cut_by(segments)})
    shards = []
    for segments in layout[rank]:
        size = max(segment.span.stop for segment in segments)
        shards.append(Shard(torch.randn(size), segments))
        shards[-1].tensor.grad = torch.randn(size)
    summed: list[Tensor] = []
    cut_rows = [(factors[name], row) for name, row in cuts if name in factors]
    optimizer = ShardOptimizer([(of, nn.Parameter(torch.empty(0))) for of in tensors], config)
    optimizer.param_groups[0]["params"] = [shard.tensor for shard in shards]
    optimizer.bind([ShardGroup(tensors, shards, cut_rows, summed.append)])
    optimizer.step()
    summed.clear()
    with host_reads() as reads, Kernels() as kernels:
        optimizer.step()
    return Costs(len(kernels.names), len(summed), reads)


ALL = OptimConfig(max_grad_norm_router=0.1, lr_b_ratio=2.0)  # three learning rates
METHODS = {
    "adamw": (ALL, False),
    "sgd": (replace(ALL, name="sgd", momentum=0.9), False),
    "scaled": (replace(ALL, preconditioner="scaled"), False),
    "tangent": (replace(ALL, preconditioner="tangent"), False),
    "tangent-mixers": (replace(ALL, preconditioner="tangent"), True),
}
LAYOUTS: dict[str, tuple[Cut, tuple[int, int], int]] = {  # how tensors are cut, which rank looks, fewest experts
    "zero-3": (per_parameter, (0, 4), 2),
    # a rank holds the end of an expert, whole ones and the start of another: up to three pieces of each shape
    "zero-3-cut-rows": (per_parameter, (1, 3), 8),
    "zero-3-last-rank": (per_parameter, (4, 5), 16),  # with padding between its runs
    "zero-0": (replicated, (0, 1), 2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_grow_neither_with_layers_nor_with_experts(layout: str, method: str) -> None:
    """And one all-reduce carries all; the host never waits. A kernel more takes another *shape*, or a larger chunk."""
    (config, mixers), (cut, place, few) = METHODS[method], LAYOUTS[layout]
    first, *others = (
        costs_of_a_step(config, cut, place, num_layers, num_experts, mixers)
        for num_layers, num_experts in ((2, few), (12, few), (2, 4 * few), (12, 4 * few))
    )
    assert first.num_kernels > 0 and (first.num_all_reduces, first.reads) == (1, [])
    assert others == [first] * 3


@pytest.mark.parametrize("method", METHODS)
def test_nor_in_one_buffer_over_all_parameters(method: str) -> None:
    """ZeRO-1 and 2: a rank's share begins and ends in the midst of a layer; these ends count less among many layers."""
    config, mixers = METHODS[method]
    few, many = (costs_of_a_step(config, one_buffer, (1, 4), num_layers, 4, mixers) for num_layers in (4, 32))
    assert 0 < many.num_kernels <= few.num_kernels
    assert (many.num_all_reduces, many.reads) == (1, [])


def test_plain_adamw_sends_nothing() -> None:
    costs = costs_of_a_step(OptimConfig(), per_parameter, (0, 4), 2, 2)
    assert (costs.num_all_reduces, costs.reads) == (0, [])


@pytest.mark.parametrize("damping", [{"damping": 0.0}, {"damping_abs": 0.0}], ids=str)
def test_the_host_waits_once_where_a_matrix_may_be_singular(damping: dict[str, Any]) -> None:
    config = OptimConfig(preconditioner="scaled", **damping)
    costs = costs_of_a_step(config, per_parameter, (0, 1), 12, 8)
    assert (costs.num_all_reduces, costs.reads) == (1, ["_local_scalar_dense"])
