"""Keys of tokens, and hashes of them: random numbers that are pure functions of where a token stands.

torch's generators give a token other numbers whenever the batch is split over ranks or micro-batches in another way, so
losses would depend on the world size. Here a token carries a key made of (seed, sequence, position); what is drawn for
it is a hash of this key, the layer's key and a column's number, the same wherever the token is computed, and the same
again when a layer is recomputed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_MASK_32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int64 tensors that hold values in [0, 2^32) (constants of the `lowbias32` hash)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)


def _as_int32(x: Tensor) -> Tensor:
    return torch.where(x > 0x7FFFFFFF, x - (1 << 32), x).to(torch.int32)


def token_keys(
    seed: int, sequence_ids: Tensor, attention_mask_BS: Tensor, position_ids_BS: Tensor | None = None
) -> Tensor:
    """(B, S) int32: one key a token, from the seed, the number of its sequence and its place among the real tokens.

    Args:
        seed: of the run
        sequence_ids: int64, the number of each sequence in the whole run: (B,), or (B, S) where rows are packed
        attention_mask_BS: (B, S), 1 for real tokens; places are counted over these, so padding side does not matter
        position_ids_BS: (B, S) where rows are packed, the place of each token in its sequence, from 0
    """
    low, high = sequence_ids & _MASK_32, (sequence_ids >> 32) & _MASK_32
    sequence = _mix(_mix(low ^ (seed & _MASK_32)) ^ _mix(high ^ ((seed >> 32) & _MASK_32)))
    if position_ids_BS is None:
        return _as_int32(_mix(sequence.unsqueeze(-1) ^ _mix(attention_mask_BS.long().cumsum(-1))))
    return _as_int32(_mix(sequence ^ _mix(position_ids_BS + 1)))


def hash_columns(keys_T: Tensor, layer_key: int, num_columns: int) -> Tensor:
    """(T, num_columns) int32, uniform in its high bits: a hash of the token's key, the layer's key and the column."""
    return hash_of_columns(keys_T, key_columns(layer_key, num_columns, keys_T.device))


def hash_of_columns(keys_T: Tensor, columns_C: Tensor) -> Tensor:
    """(T, C) int32: as `hash_columns`, with what `key_columns` gave."""
    hashed = keys_T.unsqueeze(-1) ^ columns_C
    hashed.mul_(0x7FEB352D)  # int32 arithmetic wraps around, as a hash wants
    hashed.bitwise_xor_(hashed >> 15).mul_(0x3C6EF372)
    return hashed.bitwise_xor_(hashed >> 13).mul_(0x2C1B3C6D)  # the high bits are used, so no last shift is wanted


@functools.lru_cache(maxsize=4096)
def key_columns(layer_key: int, num_columns: int, device: torch.device) -> Tensor:
    """(num_columns,) int32: hashes of the layer's key and the column, made once for every layer.

    Real ones, and made unseen, even where a planner traces a step: they outlive the trace, and are no part of the step.
    """
    with _disable_current_modes():
        columns = torch.arange(num_columns, device=device, dtype=torch.int64)
        return _as_int32(_mix(_mix(columns) ^ (layer_key & _MASK_32)))
