"""Dropout and noise that are pure functions of (seed, sequence, position, layer, feature), see `token_keys`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoelora.adapters.keyed.keys import hash_columns


def keyed_dropout(x_TD: Tensor, keys_T: Tensor, layer_key: int, probability: float) -> Tensor:
    """Zero each number with `probability` and scale the rest by `1 / (1 - probability)`.

    Args:
        x_TD: (T, D)
        keys_T: (T,) int32 from `token_keys`
        layer_key: any integer that tells layers apart
        probability: in [0, 1)
    """
    keep_TD = hash_columns(keys_T, layer_key, x_TD.shape[-1]) >= int(probability * 2**32) - 2**31
    return x_TD * keep_TD * (1.0 / (1.0 - probability))


def keyed_normal(keys_T: Tensor, layer_key: int, num_columns: int) -> Tensor:
    """(T, num_columns) fp32 standard normal numbers, as pure a function of the keys as the mask of the dropout.

    Args:
        keys_T: (T,) int32 from `token_keys`
        layer_key: any integer that tells layers apart
        num_columns: numbers of a token
    """
    high_bits = (
        hash_columns(keys_T, layer_key, num_columns) >> 9
    )  # 23 of them: fp32 holds the odd numbers below exactly
    uniform = (2 * high_bits + 1).float() * 2.0**-23  # in (-1, 1), never 0 or an end
    return torch.erfinv(uniform) * 2**0.5
