"""Which tokens speak for a row: a pure function of (seed, step, sequence, layer), as dropout is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoelora.adapters.keyed.keys import hash_columns

_LAST = 1 << 40  # behind every hash


@dataclass(frozen=True)
class TokenSample:
    """N tokens of each of B rows.

    Args:
        places_BN: int64, where they are among all T tokens; anything where a row has fewer than N
        real_BN: bool, False where it has
        same_BNM: bool, which of them are real and of one sequence
    """

    places_BN: Tensor
    real_BN: Tensor
    same_BNM: Tensor


def sample_tokens(
    keys_BS: Tensor, real_BS: Tensor, sequences_BS: Tensor | None, layer_key: int, num_tokens: int
) -> TokenSample:
    """Choose real tokens at random, the same ones however a batch is split and padded.

    Args:
        keys_BS: int32 from `dropout.token_keys`
        real_BS: bool, False for padding
        sequences_BS: number of each token's sequence where rows are packed; None where a row is one sequence
        layer_key: any integer that tells layers apart
        num_tokens: N
    """
    num_rows, length = keys_BS.shape
    order_BS = hash_columns(keys_BS.flatten(), layer_key, 1).view(num_rows, length).long()
    order_BS = order_BS.masked_fill(~real_BS, _LAST)
    chosen_BN = order_BS.argsort(dim=1, stable=True)[:, :num_tokens]
    real_BN = real_BS.gather(1, chosen_BN)
    missing = (0, num_tokens - chosen_BN.shape[1])
    chosen_BN, real_BN = (torch.nn.functional.pad(each, missing) for each in (chosen_BN, real_BN))
    same_BNM = real_BN.unsqueeze(-1) & real_BN.unsqueeze(-2)
    if sequences_BS is not None:
        sequence_BN = sequences_BS.gather(1, chosen_BN)
        same_BNM &= sequence_BN.unsqueeze(-1) == sequence_BN.unsqueeze(-2)
    first_B1 = length * torch.arange(num_rows, device=keys_BS.device).unsqueeze(-1)
    return TokenSample(first_B1 + chosen_BN, real_BN, same_BNM)
