"""What partitioned experts send for the contrastive losses, and that they agree with one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dsmoelora.config import ParallelConfig, Recipe
from tests.conftest import PoolFactory
from tests.largest_tensor import LargestTensor

WIDTH, OUT, EXPERTS, RANK, NUM_TOKENS = 10, 301, 6, 2, 4


@dataclass
class OnRank:
    """Values and gradients of this rank's part, the bytes it has sent, and the most numbers that a tensor had."""

    value: float
    x_grad: Tensor
    a_grad: Tensor
    b_grad: Tensor
    num_bytes: int
    largest: int


def make_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (rows of all ranks, sampled tokens, D), a and b of all experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, NUM_TOKENS, WIDTH), (EXPERTS, WIDTH, RANK), (EXPERTS, OUT, RANK))
    x_BND, a_EDR, b_EOR = (torch.randn(shape, generator=generator) for shape in shapes)
    return x_BND, a_EDR, b_EOR


def losses_on_rank(num_rows: list[int]) -> OnRank:
    """Both losses with this rank's rows and experts."""
    from dsmoelora.adapters.contrastive.losses import AllHere, Contrast
    from dsmoelora.adapters.contrastive.sample import TokenSample
    from dsmoelora.config import AdapterConfig
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.exchange import TokenExchange
    from dsmoelora.parallel.expert_group import PartitionedExperts
    from dsmoelora.parallel.zero import make_placement

    placement = make_placement(
        Recipe(adapter=AdapterConfig(num_experts=EXPERTS), parallel=ParallelConfig(len(num_rows)))
    )
    first, mine = sum(num_rows[: comm.rank()]), placement.local_experts
    x, a, b = make_problem()
    inputs = x[first:][: num_rows[comm.rank()]], a[mine.start : mine.stop], b[mine.start : mine.stop]
    leaves = [one.clone().requires_grad_() for one in inputs]
    group: Any = AllHere()
    if placement.ep_size > 1:
        exchange = TokenExchange(placement, "gather", 2)
        exchange.announce(NUM_TOKENS * num_rows[comm.rank()], num_rows[comm.rank()])
        group = PartitionedExperts(exchange, NUM_TOKENS)
    real_BN = torch.ones(leaves[0].shape[:2], dtype=torch.bool)
    sample = TokenSample(real_BN.long(), real_BN, real_BN.unsqueeze(-1) & real_BN.unsqueeze(-2))
    active_BNE = torch.zeros(*real_BN.shape, EXPERTS, dtype=torch.bool)
    active_BNE[:, ::2, :3] = active_BNE[:, 1::2, 2:5] = True
    contrast = Contrast(sample, active_BNE, (1.0, 1.0), 0.3, 3, group, lambda _: None)
    sent: list[int] = []
    with counting(sent), LargestTensor() as largest:
        total = torch.stack(contrast.values(*leaves)).sum()
        total.backward()
    return OnRank(total.item(), *(leaf.grad for leaf in leaves), sum(sent), largest.numel)


@contextmanager
def counting(sent: list[int]) -> Iterator[None]:
    """Inside the block every collective notes the bytes that this rank puts in."""
    import deepspeed.comm as dist

    def noting(name: str, place: int, times: int = 1) -> Any:
        real = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            sent.append(times * args[place].nbytes)
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, collective)

    num_ranks = dist.get_world_size()
    with noting("all_to_all_single", 1), noting("all_gather_into_tensor", 1, num_ranks), noting("all_reduce", 0):
        yield


def test_partitioned_experts_send_what_is_said_and_agree_with_one_rank(worker_pool: PoolFactory) -> None:
    (alone,) = worker_pool(1).run(losses_on_rank, [5])
    ranks = worker_pool(2).run(losses_on_rank, [3, 2])
    assert sum(rank.value for rank in ranks) == pytest.approx(alone.value, rel=1e-5)
    for name in ("x_grad", "a_grad", "b_grad"):
        found = torch.cat([getattr(rank, name) for rank in ranks])
        wanted = getattr(alone, name)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
    assert alone.num_bytes == 0
    num_tokens, local = 3 * NUM_TOKENS, EXPERTS // 2  # the rank with more rows decides
    tokens, features = 2 * num_tokens * WIDTH * 4, 2 * num_tokens * local * RANK * 4
    factors, grams = local * (OUT + 1) * RANK * 4, (EXPERTS * RANK) ** 2 * 4
    for rank in ranks:
        assert rank.num_bytes == 2 * (tokens + features + factors + grams)
        assert rank.largest < num_tokens * EXPERTS * OUT / 3
