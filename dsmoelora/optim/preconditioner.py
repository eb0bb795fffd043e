"""The Riemannian preconditioner as a sharded step: gradients stay where they are, R x R matrices travel.

Partial Gram matrices of this rank's rows go into the buffer of the group's one all-reduce, together with the few rows
that shard boundaries cut and with whole mixers; after it each rank multiplies its own rows. All matrices are taken
before any factor moves (Jacobi), so results do not depend on an order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.config import OptimConfig
from dsmoelora.optim.algebra import add_gram, rmul_
from dsmoelora.optim.packed import PackedBuffer
from dsmoelora.optim.riemannian import Mixers, RowFactors, row_factors
from dsmoelora.optim.rows import Run, Shard, ShardGroup, joined_spans
from dsmoelora.optim.tiles import Tile, tiles

_PAIRED = (Factor.A, Factor.B, Factor.M)  # the others, routers and magnitudes, are left as they are


@dataclass(frozen=True)
class StepReport:
    """What the preconditioner met in a step.

    Args:
        condition: largest condition number of a damped Gram matrix, estimated from below; 0 without any (scalar tensor)
        num_fallbacks: matrices that wanted an eigendecomposition
        square_norm: squared norm of the new gradient of this rank's shards, routers included, a share of it where other
            ranks hold the same (scalar tensor): a sum over ranks counts every number once
        num_ranks: how many ranks report the same matrices
    """

    condition: Tensor
    num_fallbacks: int
    square_norm: Tensor
    num_ranks: int = 1


@dataclass(frozen=True)
class _Places:
    """Single numbers of a shard and where they belong in a tensor of the buffer (both int64, one entry a number)."""

    in_shard: Tensor
    in_buffer: Tensor

    def pack(self, flat: Tensor, out: Tensor) -> None:
        out.view(-1)[self.in_buffer] = flat[self.in_shard]

    def unpack(self, source: Tensor, flat: Tensor) -> None:
        flat[self.in_shard] = source.reshape(-1)[self.in_buffer]


@dataclass(frozen=True)
class _Part:
    """One shard of this rank, and where its rows are."""

    shard: Shard
    tiles: list[Tile]
    cut: _Places
    mixers: _Places
    others: list[slice]

    @property
    def value(self) -> Tensor:
        return self.shard.tensor.detach().view(-1)

    @property
    def grad(self) -> Tensor:
        assert self.shard.tensor.grad is not None, "every trainable tensor takes part in every step"
        return self.shard.tensor.grad.view(-1)


class Preconditioner:
    """Turns the gradients of a shard group's factors into Riemannian ones, in place.

    Args:
        group: shards of one process group
        config: rule and damping

    Attributes:
        shapes: of what it packs
        report: of the last step

    Raises:
        ValueError: a factor has no partner, so there is nothing to precondition it with
    """

    def __init__(self, group: ShardGroup, config: OptimConfig) -> None:
        self._config, self._num_ranks = config, group.num_ranks
        self._first_slot, self._num_pairs = _pair_up(group)
        rank = next(of.row_size for of in group.trainables if of.factor is Factor.A)
        self._has_mixers = any(of.factor is Factor.M for of in group.trainables)
        device = group.shards[0].tensor.device
        cut_slots = [self._slot(of.layer, of.factor, row // of.shape[1]) for of, row in group.cut_rows]
        self._cut_slots = torch.tensor(cut_slots, dtype=torch.int64, device=device)
        self._parts = [self._part(shard, group.cut_rows, device) for shard in group.shards]
        square = (rank, rank)
        shapes: dict[str, tuple[int, ...]] = {"grams": (2 * self._num_pairs, *square)}
        if self._needs_cross:
            shapes["cross"] = (self._num_pairs, *square)
        if self._has_mixers:
            shapes |= {"m": (self._num_pairs, *square), "grad_m": (self._num_pairs, *square)}
        shapes |= {"cut_values": (len(cut_slots), rank), "cut_grads": (len(cut_slots), rank)}
        self.shapes = shapes
        self.report: StepReport | None = None

    @property
    def _needs_cross(self) -> bool:
        return self._config.preconditioner == "tangent" and not self._has_mixers

    def _slot(self, layer: str, factor: Factor, expert: int) -> int:
        return self._first_slot[layer, factor] + expert

    def _part(self, shard: Shard, cut_rows: list[tuple], device: torch.device) -> _Part:
        number = {(of.name, row): index for index, (of, row) in enumerate(cut_rows)}
        cut: list[tuple[int, int, int]] = []  # first number in the shard, in the buffer, how many
        mixers: list[tuple[int, int, int]] = []
        for run in shard.runs:
            if run.of.factor in (Factor.A, Factor.B):
                cut += _cut_pieces(run, number)
            elif run.of.factor is Factor.M:
                first = self._first_slot[run.of.layer, Factor.A] * run.of.row_size**2
                mixers.append((run.offset, first + run.start, run.stop - run.start))
        own_tiles = tiles(shard.runs, self._first_slot, device)
        others = joined_spans(run for run in shard.runs if run.of.factor not in _PAIRED)
        return _Part(shard, own_tiles, _places(cut, device), _places(mixers, device), others)

    def finish(self, buffer: PackedBuffer) -> None:
        """Precondition the gradients at hand with what all ranks packed."""
        self._count_cut_rows(buffer)
        gram_a, gram_b = buffer["grams"].chunk(2)
        mixers = Mixers(buffer["m"], buffer["grad_m"]) if self._has_mixers else None
        cross = buffer["cross"] if self._needs_cross else None
        factors = row_factors(self._config, gram_a, gram_b, cross, mixers)
        square_norm = self._multiply(buffer, factors)
        self.report = StepReport(factors.condition, factors.num_fallbacks, square_norm, self._num_ranks)

    def pack(self, buffer: PackedBuffer) -> None:
        """Everything this rank has to say, into the zeroed buffer."""
        for part in self._parts:
            for tile in part.tiles:
                add_gram(buffer["grams"], tile, part.value, part.value)
                if self._needs_cross and tile.factor is Factor.A:
                    add_gram(buffer["cross"], tile, part.value, part.grad)
            part.cut.pack(part.value, buffer["cut_values"])
            part.cut.pack(part.grad, buffer["cut_grads"])
            if self._has_mixers:
                part.mixers.pack(part.value, buffer["m"])
                part.mixers.pack(part.grad, buffer["grad_m"])

    def _count_cut_rows(self, buffer: PackedBuffer) -> None:
        """The cut rows, whole now, enter the sums once."""
        values, grads = buffer["cut_values"], buffer["cut_grads"]
        buffer["grams"].index_add_(0, self._cut_slots, values.unsqueeze(-1) * values.unsqueeze(-2))
        if self._needs_cross:
            of_a = (self._cut_slots < self._num_pairs).to(values.dtype)[:, None, None]
            products = of_a * values.unsqueeze(-1) * grads.unsqueeze(-2)
            buffer["cross"].index_add_(0, self._cut_slots % self._num_pairs, products)

    def _multiply(self, buffer: PackedBuffer, factors: RowFactors) -> Tensor:
        """Put the new gradients in place; returns this rank's share of their squared norm, with routers (scalar)."""
        values, grads = buffer["cut_values"], buffer["cut_grads"]
        new_cut = torch.bmm(grads.unsqueeze(1), factors.times[self._cut_slots])
        if factors.minus is not None:
            new_cut.baddbmm_(values.unsqueeze(1), factors.minus[self._cut_slots], alpha=-1)
        shares = []
        for part in self._parts:
            squares = [rmul_(part.grad, tile, factors.times, part.value, factors.minus) for tile in part.tiles]
            part.cut.unpack(new_cut, part.grad)
            if factors.grad_m is not None:
                part.mixers.unpack(factors.grad_m, part.grad)
            rest: list[Tensor | slice] = [part.cut.in_shard, part.mixers.in_shard, *part.others]
            squares.append(torch.stack(torch._foreach_norm([part.grad[where] for where in rest])).square().sum())
            shares.append(torch.stack(squares).sum() / part.shard.num_copies)
        return torch.stack(shares).sum()


class RouterReport:
    """The report of a process group that has routers and nothing to precondition; nothing travels for it.

    Args:
        group: shards of one process group

    Attributes:
        shapes: of what it packs: none
        report: of the last step
    """

    def __init__(self, group: ShardGroup) -> None:
        self._spans = [(shard.tensor, joined_spans(shard.runs)) for shard in group.shards]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.report: StepReport | None = None

    def pack(self, buffer: PackedBuffer) -> None:
        """Nothing."""

    def finish(self, buffer: PackedBuffer) -> None:
        """Take the norm of the gradients as they are."""
        zero = self._spans[0][0].new_zeros(())
        grads = [tensor.grad.view(-1)[span] for tensor, spans in self._spans for span in spans]  # type: ignore[union-attr]
        square_norm = sum((grad.square().sum() for grad in grads), start=zero)
        self.report = StepReport(zero, 0, square_norm)


def _pair_up(group: ShardGroup) -> tuple[dict[tuple[str, Factor], int], int]:
    """Slot of expert 0 by layer and role (a: number of the pair; b: the same after all a), and the number of pairs.

    Slots are for the group's own experts; where these begin above 0, the slot of expert 0 lies below theirs.
    """
    shapes = {(of.layer, of.factor): of.shape for of in group.trainables if of.factor in _PAIRED}
    first_slot: dict[tuple[str, Factor], int] = {}
    num_pairs = 0
    for layer, factor in shapes:
        partner = Factor.B if factor is Factor.A else Factor.A
        if (layer, partner) not in shapes:
            raise ValueError(f"{layer} has {factor.value} but no {partner.value} in its process group")
        if factor is Factor.A:
            experts = group.experts or range(shapes[layer, factor][0])
            first_slot[layer, factor] = num_pairs - experts.start
            num_pairs += len(experts)
    return first_slot | {(layer, Factor.B): num_pairs + slot for (layer, _), slot in first_slot.items()}, num_pairs


def _cut_pieces(run: Run, number: dict[tuple[str, int], int]) -> list[tuple[int, int, int]]:
    """The pieces of cut rows in a run: first number in the shard, first in the buffer of cut rows, how many."""
    size = run.of.row_size
    pieces = []
    for row in sorted({run.start // size, (run.stop - 1) // size}):
        if (run.of.name, row) in number:
            start, stop = max(run.start, row * size), min(run.stop, (row + 1) * size)
            in_buffer = number[run.of.name, row] * size + start - row * size
            pieces.append((run.offset + start - run.start, in_buffer, stop - start))
    return pieces


def _places(pieces: list[tuple[int, int, int]], device: torch.device) -> _Places:
    def numbers(which: int) -> Tensor:
        ranges = [torch.arange(piece[which], piece[which] + piece[2], device=device) for piece in pieces]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)

    return _Places(numbers(0), numbers(1))
