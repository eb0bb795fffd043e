"""Dropout and noise that are pure functions of (seed, sequence, position, layer, feature), see `token_keys`."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dsmoelora.adapters.keyed.keys import hash_columns, hash_of_columns, key_columns
from dsmoelora.adapters.regions import Region
from dsmoelora.config import CompileChoice
from dsmoelora.errors import bad_value

logger = logging.getLogger(__name__)


def keyed_dropout(x_TD: Tensor, keys_T: Tensor, layer_key: int, probability: float) -> Tensor:
    """Zero each number with `probability` and scale the rest by `1 / (1 - probability)`.

    Args:
        x_TD: (T, D)
        keys_T: (T,) int32 from `token_keys`
        layer_key: any integer that tells layers apart
        probability: in [0, 1)
    """
    columns_D = key_columns(layer_key, x_TD.shape[-1], x_TD.device)
    return _dropped(x_TD, keys_T, columns_D, *_threshold_and_scale(probability))


def _threshold_and_scale(probability: float) -> tuple[int, float]:
    """What a hash must reach to be kept, and what is kept is multiplied by."""
    return int(probability * 2**32) - 2**31, 1.0 / (1.0 - probability)


@Region
def _dropped(x_TD: Tensor, keys_T: Tensor, columns_D: Tensor, threshold: int, scale: float) -> Tensor:
    return x_TD * (hash_of_columns(keys_T, columns_D) >= threshold) * scale


def settle_dropout(choice: CompileChoice, probability: float, device: torch.device, dtype: torch.dtype) -> None:
    """Have dropout make one pass over its input, forward and backward, instead of a dozen; the numbers stay the same.

    Args:
        choice: `on`, `off`, or `auto`: on an accelerator for which there is a compiler
        probability: of the run; without dropout nothing is compiled
        device: of the model
        dtype: of the layers' inputs

    Raises:
        ConfigError: the choice is `on`, and there is no compiler
    """
    _dropped.use_eager()
    if probability == 0 or choice == "off" or (choice == "auto" and device.type == "cpu"):
        return
    x_TD = torch.ones(3, 5, device=device, dtype=dtype, requires_grad=True)
    keys_T, columns_D = (torch.arange(size, dtype=torch.int32, device=device) for size in x_TD.shape)
    try:
        # of this very probability, whose numbers become constants of the code: with variables it would be slow
        _dropped.use_compiled((x_TD, keys_T, columns_D, *_threshold_and_scale(probability)))
    except Exception as error:  # whatever torch's compilers raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if choice == "on":
            remedy = "Install one (Triton for CUDA, g++ for a CPU), or set it to auto."
            allowed = f"auto or off where torch.compile finds no compiler for {device.type} ({reason})"
            raise bad_value("train.compile", choice, allowed, remedy) from error
        logger.warning("Dropout takes a dozen passes over its input, for torch.compile does not work here: %s", reason)


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
