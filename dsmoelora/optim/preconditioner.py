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
from dsmoelora.optim.frozen import FrozenGrams
from dsmoelora.optim.packed import PackedBuffer
from dsmoelora.optim.riemannian import Mixers, RowFactors, row_factors
from dsmoelora.optim.rows import JoinedShards, Segment, ShardGroup, joined_spans
from dsmoelora.optim.tiles import tiles

_PAIRED = (Factor.A, Factor.B, Factor.M)  # the others, routers and magnitudes, are left as they are


@dataclass(frozen=True)
class StepReport:
    """What the preconditioner met in a step.

    Args:
        condition: largest condition number of a damped Gram matrix, estimated from below; 0 without any (scalar tensor)
        num_fallbacks: matrices that Cholesky could not take (scalar tensor)
        square_norm: squared norm of the new gradient of this rank's shards, routers included, a share of it where other
            ranks hold the same (scalar tensor): a sum over ranks counts every number once
        num_ranks: how many ranks report the same matrices
    """

    condition: Tensor
    num_fallbacks: Tensor
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


class Preconditioner:
    """Turns the gradients of a shard group's factors into Riemannian ones, in place.

    Args:
        group: shards of one process group
        config: rule and damping
        frozen: of the factors that are not trained, which have no rows in any shard

    Attributes:
        shapes: of what it packs
        report: of the last step

    Raises:
        ValueError: a factor has no partner, trained or frozen, so there is nothing to precondition it with
    """

    def __init__(self, group: ShardGroup, config: OptimConfig, frozen: FrozenGrams) -> None:
        self._config, self._num_ranks, self._experts = config, group.num_ranks, group.experts
        self._first_slot, self._num_pairs = _pair_up(group, frozen)
        rank = next(of.row_size for of in group.trainables if of.factor in (Factor.A, Factor.B))
        self._has_mixers = any(of.factor is Factor.M for of in group.trainables)
        device = group.shards[0].tensor.device
        cut_slots = [self._slot(of.layer, of.factor, row // of.shape[1]) for of, row in group.cut_rows]
        self._cut_slots = torch.tensor(cut_slots, dtype=torch.int64, device=device)
        self._shards = JoinedShards(group.shards)
        self._tiles = tiles(self._shards.segments, self._first_slot, device)
        self._find_places(group.cut_rows, device)
        square = (rank, rank)
        shapes: dict[str, tuple[int, ...]] = {"grams": (2 * self._num_pairs, *square)}
        if self._needs_cross:
            shapes["cross"] = (self._num_pairs, *square)
        if self._has_mixers:
            shapes |= {"m": (self._num_pairs, *square), "grad_m": (self._num_pairs, *square)}
        shapes |= {"cut_values": (len(cut_slots), rank), "cut_grads": (len(cut_slots), rank)}
        self.shapes = shapes
        self.report: StepReport | None = None
        self._frozen_grams: Tensor | None = None
        self.set_frozen(frozen)

    def set_frozen(self, frozen: FrozenGrams) -> None:
        """Learn the Gram matrices of the factors that are not trained."""
        own = {key: gram for key, gram in frozen.items() if key in self._first_slot}
        if not own:
            return
        rank, device = self.shapes["grams"][-1], self._cut_slots.device
        self._frozen_grams = torch.zeros(self.shapes["grams"], device=device)
        for (layer, factor), gram_LRR in own.items():
            first = self._slot(layer, factor, self._experts.start if self._experts else 0)
            self._frozen_grams[first : first + len(gram_LRR)] = gram_LRR.view(-1, rank, rank).to(device)

    @property
    def _needs_cross(self) -> bool:
        return self._config.preconditioner == "tangent" and not self._has_mixers

    def _slot(self, layer: str, factor: Factor, expert: int) -> int:
        return self._first_slot[layer, factor] + expert

    def _find_places(self, cut_rows: list[tuple], device: torch.device) -> None:
        """Where numbers lie that are no whole rows of factors."""
        number = {(of.name, row): index for index, (of, row) in enumerate(cut_rows)}
        cut: list[tuple[int, int, int]] = []  # first number in the shard, in the buffer, how many
        mixers: list[tuple[int, int, int]] = []
        segments = self._shards.segments
        for segment in segments:
            if segment.of.factor in (Factor.A, Factor.B):
                cut += _cut_pieces(segment, number)
            elif segment.of.factor is Factor.M:
                first = self._first_slot[segment.of.layer, Factor.A] * segment.of.row_size**2
                mixers.append((segment.offset, first + segment.start, segment.stop - segment.start))
        self._cut, self._mixers = _places(cut, device), _places(mixers, device)
        self._others = joined_spans(segment for segment in segments if segment.of.factor not in _PAIRED)

    def finish(self, buffer: PackedBuffer) -> None:
        """Precondition the gradients at hand with what all ranks packed."""
        self._count_cut_rows(buffer)
        grams = buffer["grams"] if self._frozen_grams is None else buffer["grams"] + self._frozen_grams
        gram_a, gram_b = grams.chunk(2)
        mixers = Mixers(buffer["m"], buffer["grad_m"]) if self._has_mixers else None
        cross = buffer["cross"] if self._needs_cross else None
        factors = row_factors(self._config, gram_a, gram_b, cross, mixers)
        value, grad = self._shards.value, self._shards.grad
        square_norm = self._multiply(buffer, factors, value, grad)
        self._shards.put_grad(grad)
        self.report = StepReport(factors.condition, factors.num_fallbacks, square_norm, self._num_ranks)

    def pack(self, buffer: PackedBuffer) -> None:
        """Everything this rank has to say, into the zeroed buffer."""
        value, grad = self._shards.value, self._shards.grad
        for tile in self._tiles:
            add_gram(buffer["grams"], tile, value, value)
            if self._needs_cross and tile.factor is Factor.A:
                add_gram(buffer["cross"], tile, value, grad)
        self._cut.pack(value, buffer["cut_values"])
        self._cut.pack(grad, buffer["cut_grads"])
        if self._has_mixers:
            self._mixers.pack(value, buffer["m"])
            self._mixers.pack(grad, buffer["grad_m"])

    def _count_cut_rows(self, buffer: PackedBuffer) -> None:
        """The cut rows, whole now, enter the sums once."""
        values, grads = buffer["cut_values"], buffer["cut_grads"]
        buffer["grams"].index_add_(0, self._cut_slots, values.unsqueeze(-1) * values.unsqueeze(-2))
        if self._needs_cross:
            of_a = (self._cut_slots < self._num_pairs).to(values.dtype)[:, None, None]
            products = of_a * values.unsqueeze(-1) * grads.unsqueeze(-2)
            buffer["cross"].index_add_(0, self._cut_slots % self._num_pairs, products)

    def _multiply(self, buffer: PackedBuffer, factors: RowFactors, value: Tensor, grad: Tensor) -> Tensor:
        """New gradients in place of those at hand; this rank's share of their squared norm, with routers (scalar)."""
        values, grads = buffer["cut_values"], buffer["cut_grads"]
        new_cut = torch.bmm(grads.unsqueeze(1), factors.times[self._cut_slots])
        if factors.minus is not None:
            new_cut.baddbmm_(values.unsqueeze(1), factors.minus[self._cut_slots], alpha=-1)
        squares = [rmul_(grad, tile, factors.times, value, factors.minus) for tile in self._tiles]
        self._cut.unpack(new_cut, grad)
        if factors.grad_m is not None:
            self._mixers.unpack(factors.grad_m, grad)
        rest: list[Tensor | slice] = [self._cut.in_shard, self._mixers.in_shard, *self._others]
        squares.append(torch.stack(torch._foreach_norm([grad[where] for where in rest])).square().sum())
        return torch.stack(squares).sum() / self._shards.num_copies


class RouterReport:
    """The report of a process group that has routers and nothing to precondition; nothing travels for it.

    Args:
        group: shards of one process group

    Attributes:
        shapes: of what it packs: none
        report: of the last step
    """

    def __init__(self, group: ShardGroup) -> None:
        self._spans = [(shard.tensor, span) for shard in group.shards for span in joined_spans(shard.segments)]
        self._zero = group.shards[0].tensor.new_zeros(())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.report: StepReport | None = None

    def pack(self, buffer: PackedBuffer) -> None:
        """Nothing."""

    def finish(self, buffer: PackedBuffer) -> None:
        """Take the norm of the gradients as they are."""
        grads = [tensor.grad.view(-1)[span] for tensor, span in self._spans]  # type: ignore[union-attr]
        square_norm = torch.stack(torch._foreach_norm(grads)).square().sum() if grads else self._zero
        self.report = StepReport(self._zero, self._zero, square_norm)


def _pair_up(group: ShardGroup, frozen: FrozenGrams) -> tuple[dict[tuple[str, Factor], int], int]:
    """Slot of expert 0 by layer and role (a: number of the pair; b: the same after all a), and the number of pairs.

    Slots are for the group's own experts; where these begin above 0, the slot of expert 0 lies below theirs.
    """
    shapes = {(of.layer, of.factor): of.shape for of in group.trainables if of.factor in _PAIRED}
    first_slot: dict[tuple[str, Factor], int] = {}
    num_pairs = 0
    for layer, factor in shapes:
        partner = Factor.B if factor is Factor.A else Factor.A
        if (layer, partner) not in shapes and (layer, partner) not in frozen:
            raise ValueError(f"{layer} has {factor.value} but no {partner.value} in its process group")
        if (layer, Factor.A) not in first_slot:
            experts = group.experts or range(shapes[layer, factor][0])
            first_slot[layer, Factor.A] = num_pairs - experts.start
            num_pairs += len(experts)
    return first_slot | {(layer, Factor.B): num_pairs + slot for (layer, _), slot in first_slot.items()}, num_pairs


def _cut_pieces(segment: Segment, number: dict[tuple[str, int], int]) -> list[tuple[int, int, int]]:
    """The pieces of cut rows in a segment: first number in the shard, first in the buffer of cut rows, how many."""
    size = segment.of.row_size
    pieces = []
    for row in sorted({segment.start // size, (segment.stop - 1) // size}):
        if (segment.of.name, row) in number:
            start, stop = max(segment.start, row * size), min(segment.stop, (row + 1) * size)
            in_buffer = number[segment.of.name, row] * size + start - row * size
            pieces.append((segment.offset + start - segment.start, in_buffer, stop - start))
    return pieces


def _places(pieces: list[tuple[int, int, int]], device: torch.device) -> _Places:
    def numbers(which: int) -> Tensor:
        ranges = [torch.arange(piece[which], piece[which] + piece[2], device=device) for piece in pieces]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)

    return _Places(numbers(0), numbers(1))
