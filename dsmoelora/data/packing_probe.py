"""Proof that packing keeps samples apart in a model: of one sample another one in its row must change nothing."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from dsmoelora.data.loader import MicroBatch
from dsmoelora.errors import ModelError

_PROBE_LENGTH = 4


def check_takes_positions(model: nn.Module) -> None:
    """Refuse to pack for a model that could not be told where samples begin.

    Raises:
        ModelError: its forward has no argument `position_ids`
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _cannot_pack(model, "it takes no position_ids, so it cannot be told where a sample begins")


def probe(vocab_size: int) -> MicroBatch:
    """Three rows that end in the same sample, for `check_probe`.

    Another sample stands before it in the first row, yet another one in the second; in the third row the first sample
    and the common one are a single sample.
    """
    tokens = torch.randint(
        vocab_size // 4, vocab_size // 2, (3, _PROBE_LENGTH), generator=torch.Generator().manual_seed(0)
    )
    first, second, common = tokens
    ids = torch.stack([torch.cat([before, common]) for before in (first, second, first)])
    positions = torch.arange(_PROBE_LENGTH)
    apart, joined = torch.cat([positions, positions]), torch.arange(2 * _PROBE_LENGTH)
    return MicroBatch(
        ids, torch.ones_like(ids), ids, torch.zeros_like(ids), 1, ids.numel(), torch.stack([apart, apart, joined])
    )


def check_probe(model: nn.Module, logits_BSV: Tensor) -> None:
    """Check that a sample does not see the one before it in its row.

    Args:
        model: for the message
        logits_BSV: what it makes of `probe`

    Raises:
        ModelError: the logits of the common sample depend on its neighbour
    """
    first, second, joined = logits_BSV[:, -_PROBE_LENGTH:].float()
    leak, effect = (first - second).abs().max(), (first - joined).abs().max()
    if not leak <= effect / 4:  # an isolated sample leaves rounding errors; of NaN nothing is known
        raise _cannot_pack(model, "its samples see each other: the logits of one change with the sample before it")


def _cannot_pack(model: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"data.packing is true, but {type(model).__name__} cannot be trained on packed rows: {reason}. "
        "Set data.packing to false."
    )
