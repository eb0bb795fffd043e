"""Tensors on their way between the ranks of a group, while this rank computes something else.

A collective is started, and waited for where its result is needed. The backward pass is the forward pass turned round:
the gradient starts where the result was waited for, and is waited for where the transfer was started. So whatever was
computed in between overlaps with both. `dist`'s asynchronous collectives run on threads (gloo) or on a stream (NCCL)
of their own, and keep what they read alive until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

# names in the summary of DeepSpeed's comms logger; it counts an all-gather by what one rank puts in
GATHER_LOG, ALL_TO_ALL_LOG = "token_exchange_all_gather", "token_exchange_all_to_all"


Then = Callable[[Tensor], Tensor]


def unchanged(received: Tensor) -> Tensor:
    """The result of a transfer after which nothing is left to do."""
    return received


@dataclass(frozen=True)
class Pending:
    """A collective under way.

    Args:
        handle: of `dist`
        received: filled when the collective is over
        then: makes the result of what was received
    """

    handle: Any
    received: Tensor
    then: Then = unchanged

    def wait(self) -> Tensor:
        """The result; on an accelerator its stream waits, not the host."""
        self.handle.wait()
        return self.then(self.received)


Start = Callable[[Tensor], Pending]


def start_all_to_all(x_NX: Tensor, send: list[int], receive: list[int], group: Any, then: Then = unchanged) -> Pending:
    """Blocks of rows to and from every rank of a group: ordered by destination -> ordered by source.

    Args:
        x_NX: (sum(send), ...)
        send: rows for each rank
        receive: rows from each rank
        group: process group
        then: makes the result of what comes
    """
    received = x_NX.new_empty(sum(receive), *x_NX.shape[1:])
    handle = dist.all_to_all_single(
        received,
        x_NX.contiguous(),
        output_split_sizes=receive,
        input_split_sizes=send,
        group=group,
        async_op=True,
        log_name=ALL_TO_ALL_LOG,
    )
    return Pending(handle, received, then)


def start_all_gather(x_NX: Tensor, group: Any, num_ranks: int) -> Pending:
    """(N, ...) of every rank, N being the same on all -> (P N, ...), by rank."""
    gathered = x_NX.new_empty(num_ranks * x_NX.shape[0], *x_NX.shape[1:])
    handle = dist.all_gather_into_tensor(gathered, x_NX.contiguous(), group=group, async_op=True, log_name=GATHER_LOG)
    return Pending(handle, gathered)


class Transfer:
    """A tensor on its way, and its gradient on the way back.

    Args:
        x: what is sent, at once
        there: starts the collective
        back: starts that of the gradient
    """

    def __init__(self, x: Tensor, there: Start, back: Start) -> None:
        self._way = _Way(there, back)
        self._ticket: Tensor = _Depart.apply(x, self._way)
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """What has come; waited for at the first call."""
        if self._result is None:
            self._result = _Arrive.apply(self._ticket, self._way)
        return self._result


@dataclass
class _Way:
    """What both ends of a transfer know; not the transfer itself, which would keep its own graph alive."""

    there: Start
    back: Start
    pending: Pending | None = None

    def wait(self) -> Tensor:
        assert self.pending is not None, "nothing is under way"
        pending, self.pending = self.pending, None
        return pending.wait()


class _Depart(torch.autograd.Function):
    """The tensor starts; its gradient comes in. An empty tensor stands in the graph for what is under way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        way.pending = way.there(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.way.wait(), None


class _Arrive(torch.autograd.Function):
    """The tensor comes in; its gradient starts."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.pending = ctx.way.back(grad)
        return grad.new_empty(0), None
