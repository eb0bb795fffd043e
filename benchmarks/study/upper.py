"""The upper part of a model, fed with the hidden states that its frozen lower part gives for each row.

Below the first adapted layer nothing changes while adapters are trained. So its output is computed once for every row
of a study and kept in a file, and a cell computes the upper layers alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsmoelora.errors import ModelError

_ROWS_AT_ONCE = 16


class Samples(Protocol):
    """Tokenised rows by number."""

    num_tokens: np.ndarray
    fingerprint: str

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels."""


class _Reached(Exception):
    """The first layer of the upper part has been called."""


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a model.

    Raises:
        ModelError: they do not lie where they do in Llama-likes
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of layers that could be cut in two. Use --depth full.")
    return layers


def hidden_below(model: Any, num_below: int, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """(B, S, D): what layer `num_below` of a whole model is called with."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        seen.append(inputs[0] if inputs else options["hidden_states"])
        raise _Reached

    hook = layers_of(model)[num_below].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)
    except _Reached:
        return seen[0]
    finally:
        hook.remove()
    raise AssertionError("the layer was not called")


def keep_upper(model: Any, num_below: int) -> None:
    """Take the lower layers off: `inputs_embeds` are the hidden states of `hidden_below` from now on."""
    model.base_model.layers = layers_of(model)[num_below:]
    model.config.num_hidden_layers -= num_below


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of some rows, one after the other in a file that all processes map.

    Args:
        states_TD: of all their tokens
        first: place of a row's first token, by the row's number
        num_tokens: of the rows, by number
    """

    states_TD: Tensor
    first: dict[int, int]
    num_tokens: np.ndarray

    def of(self, rows: Sequence[int]) -> Tensor:
        """(B, S, D): padded on the right with zeros to the longest of the rows."""
        parts = [self.states_TD[self.first[row] : self.first[row] + int(self.num_tokens[row])] for row in rows]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True)


def cached(model: Any, digest: str, num_below: int, samples: Samples, rows: Sequence[int], file: Path) -> HiddenStates:
    """The hidden states of these rows, from the file where it has them all, else computed into it.

    Args:
        model: whole, frozen
        digest: what tells it from others
        num_below: layers below the first adapted one
        samples: the set
        rows: numbers of the rows that are wanted
        file: for such a model and set; beside it lies a description of what it holds
    """
    dtype, width = model.dtype, model.config.hidden_size
    kind = {"dtype": str(dtype), "width": width}
    about = {"model": digest, "set": samples.fingerprint, "layers": num_below} | kind
    description = file.with_suffix(".json")
    known = json.loads(description.read_text()) if description.exists() else {}
    held = known.pop("rows", []) if known else []
    if known != about or not set(rows) <= set(held):
        held = sorted({*rows, *(held if known == about else [])})
        description.unlink(missing_ok=True)
        _compute(model, num_below, samples, held, file)
        description.write_text(json.dumps(about | {"rows": held}))
    ends = np.cumsum(samples.num_tokens[held])
    states_TD = torch.from_file(str(file), shared=True, size=int(ends[-1]) * width, dtype=dtype).view(-1, width)
    first = dict(zip(held, (ends - samples.num_tokens[held]).tolist(), strict=True))
    return HiddenStates(states_TD, first, samples.num_tokens)


def _compute(model: Any, num_below: int, samples: Samples, rows: Sequence[int], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(samples.num_tokens[list(rows)])
    first = dict(zip(rows, (ends - samples.num_tokens[list(rows)]).tolist(), strict=True))
    width, partial = model.config.hidden_size, file.with_suffix(".partial")
    size = int(ends[-1]) * width
    with partial.open("wb") as out:
        out.truncate(size * model.dtype.itemsize)
    states_TD = torch.from_file(str(partial), shared=True, size=size, dtype=model.dtype).view(-1, width)
    by_length = sorted(rows, key=lambda row: int(samples.num_tokens[row]))
    for begin in range(0, len(by_length), _ROWS_AT_ONCE):
        some = by_length[begin : begin + _ROWS_AT_ONCE]
        ids = [torch.tensor(samples.sample(row)[0]) for row in some]
        mask_BS = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        ids_BS = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        hidden_BSD = hidden_below(model, num_below, ids_BS.to(model.device), mask_BS.to(model.device))
        for row, hidden_SD in zip(some, hidden_BSD, strict=True):
            states_TD[first[row] : first[row] + int(samples.num_tokens[row])] = hidden_SD[
                : samples.num_tokens[row]
            ].cpu()
    del states_TD
    partial.replace(file)
