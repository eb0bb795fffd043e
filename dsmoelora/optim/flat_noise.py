"""Noise in the frozen weights, so that experts learn where the loss is flat: torch alone, on pieces of any cut.

Flat-LoRA (Li et al. 2024, arXiv 2409.14396) trains on the mean loss over random changes of the merged weight
`W' = W + dW`. Row i of `W'` (of D numbers) is changed by independent normal numbers of variance

    sigma_t^2 ||W'_i||^2 / D        sigma_t = sigma (1 - cos(pi t / T)) / 2        t of T steps are taken

so that the noise of an output is sigma_t times as large as the output of a random input. What is drawn for a number is
a hash of (seed, t, layer, its place in the weight): the same on every rank that holds it, however the weight is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.keyed.draws import keyed_normal
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.seeds import derive_seed

_AT_ONCE = 1 << 22  # numbers of a block


def ramp(step: int, num_steps: int) -> float:
    """Share of sigma after `step` of `num_steps` steps, from 0 to 1 along a cosine."""
    return (1.0 - math.cos(math.pi * step / num_steps)) / 2.0


@dataclass(frozen=True)
class NoisyWeight:
    """A weight as it lies in memory.

    Args:
        layer: name of its layer
        shape: (P, Q): (O, D), or (D, O) where it is kept the other way round (`Conv1D`)
        has_output_rows: the former
    """

    layer: str
    shape: tuple[int, int]
    has_output_rows: bool

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.shape[0 if self.has_output_rows else 1]

    @property
    def num_inputs(self) -> int:
        """D."""
        return self.shape[1 if self.has_output_rows else 0]

    def squares(self, clean: Tensor, start: int, b_OK: Tensor, a_DK: Tensor) -> Tensor:
        """(O,) fp32: what a piece adds to the squared lengths of the rows of `W + b a^T`.

        Args:
            clean: flat, the numbers of W from `start` on; longer than W is padding
            start: place of its first number
            b_OK, a_DK: fp32 factors of the update, on the device that computes
        """
        left_PK, right_QK = (b_OK, a_DK) if self.has_output_rows else (a_DK, b_OK)
        sums_O = b_OK.new_zeros(self.num_outputs)
        for rows, of_piece, of_block in self._blocks(start, len(clean)):
            merged = (left_PK[rows] @ right_QK.t()).view(-1)[of_block] + clean[of_piece].to(b_OK)
            block_PQ = b_OK.new_zeros(rows.stop - rows.start, self.shape[1])
            block_PQ.view(-1)[of_block] = merged
            if self.has_output_rows:
                sums_O[rows] += block_PQ.square().sum(1)
            else:
                sums_O += block_PQ.square().sum(0)
        return sums_O

    def add_noise(self, piece: Tensor, clean: Tensor, start: int, std_O: Tensor, seed: int, step: int) -> None:
        """Let a piece be `clean` with noise, rounded once to its dtype.

        Args:
            piece: flat memory, written to
            clean: its numbers
            start: place of its first number
            std_O: standard deviation in each row of (O, D), fp32, on the device that computes
            seed: of the run
            step: t
        """
        place_1P = torch.arange(self.shape[0], device=std_O.device).unsqueeze(0)
        keys_P = token_keys(seed, place_1P.new_tensor([[step]]), torch.ones_like(place_1P), place_1P).squeeze(0)
        layer_key = derive_seed("flat_noise", self.layer)
        for rows, of_piece, of_block in self._blocks(start, len(clean)):
            noise_PQ = keyed_normal(keys_P[rows], layer_key, self.shape[1])
            noise_PQ *= std_O[rows].unsqueeze(1) if self.has_output_rows else std_O
            piece[of_piece] = (clean[of_piece].to(std_O) + noise_PQ.view(-1)[of_block]).to(piece)

    def _blocks(self, start: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
        """Rows of (P, Q), what of a piece lies in them, and where in these rows that is."""
        num_rows, width = self.shape
        stop = min(start + length, num_rows * width)
        rows_at_once = max(1, _AT_ONCE // width)
        for first in range(start // width, -(-stop // width), rows_at_once):
            last = min(first + rows_at_once, -(-stop // width))
            low, high = max(start, first * width), min(stop, last * width)
            yield slice(first, last), slice(low - start, high - start), slice(low - first * width, high - first * width)
