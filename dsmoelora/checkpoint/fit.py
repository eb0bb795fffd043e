"""Whether a checkpoint belongs to the run that wants to load it, and whether a state may be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsmoelora.adapters import Factor
from dsmoelora.checkpoint.layout import DTYPE_NAMES
from dsmoelora.checkpoint.rank_file import ShardState
from dsmoelora.checkpoint.table import Table, first_gap
from dsmoelora.errors import CheckpointError, listing
from dsmoelora.optim.rows import Trainable

_AS_SAVED_OR_NEW = "as in the run that saved it, or start a new run (another run.name)"
# Which setting decides each dim of a parameter's shape.
_SHAPE_KEYS = {
    Factor.A: ("adapter.num_experts", "model.path (in-features)", "adapter.r"),
    Factor.B: ("adapter.num_experts", "model.path (out-features)", "adapter.r"),
    Factor.M: ("adapter.num_experts", "adapter.r", "adapter.r"),
    Factor.MAGNITUDE: ("adapter.num_experts", "model.path (out-features)"),
    Factor.ROUTER: ("adapter.num_experts", "model.path (in-features)"),
}


def check_fit(folder: Path, saved: Table, wanted: Table) -> None:
    """Compare a checkpoint with what all ranks together want to load.

    Raises:
        CheckpointError: parameters, shapes or the optimizer's tensors differ, or the checkpoint has a gap
    """
    before, here = ({of.name: of for of in table.parameters} for table in (saved, wanted))
    _check_names(folder, before, here)
    for name, parameter in here.items():
        if parameter.shape != before[name].shape:
            raise CheckpointError(_shape_message(folder, before[name], parameter))
    _check_tensors(folder, saved.kind_of, wanted.kind_of)
    gap = first_gap(saved)
    if gap is not None:
        parameter, start, stop = gap
        raise CheckpointError(
            f"{folder} does not hold elements {start} to {stop} of {parameter.name}. Resume from another checkpoint."
        )


def check_savable(held: Table) -> None:
    """Check that what all ranks hold makes a whole checkpoint.

    Raises:
        CheckpointError: there is nothing to save, an element is held by no rank, or ranks keep different tensors
    """
    if not len(held.rows):
        raise CheckpointError("There is nothing to save: no rank holds a trainable parameter. Check the adapters.")
    gap = first_gap(held)
    if gap is not None:
        parameter, start, stop = gap
        raise CheckpointError(f"Not saved: no rank holds elements {start} to {stop} of {parameter.name}.")
    _ = held.kind_of


def check_numbers(shards: list[ShardState]) -> None:
    """Check the numbers of this rank before they are saved.

    Raises:
        CheckpointError: a tensor is missing, too short or has a dtype of no use, or a number in a segment is not finite
    """
    check_lengths(shards)
    for shard in shards:
        for name, tensor in shard.flat.items():
            if _all_finite(tensor):  # one look at the whole tensor, padding and all, is the usual case
                continue
            for segment in shard.segments:
                if not _all_finite(tensor[segment.span]):
                    raise CheckpointError(
                        f"Not saved: `{name}` of parameter {segment.of.name} holds values that are not finite "
                        f"(elements {segment.start} to {segment.stop})."
                        " Go on from an older checkpoint with a lower optim.lr."
                    )


def check_lengths(shards: list[ShardState]) -> None:
    """Check that the flat tensors of this rank reach as far as their segments.

    Raises:
        CheckpointError: a tensor is missing, empty, too short, not contiguous, or has a dtype that cannot be stored
    """
    for shard in shards:
        last = max(
            (segment for segment in shard.segments if segment.stop > segment.start),
            key=lambda segment: segment.span.stop,
            default=None,
        )
        if last is not None and not shard.tensors:
            raise CheckpointError(f"Parameter {last.of.name} comes without tensors: there is nothing to save or load.")
        for name, tensor in shard.tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"`{name}` has dtype {tensor.dtype}; a checkpoint holds {listing(_dtypes())}.")
            if last is not None and (not tensor.is_contiguous() or tensor.numel() < last.span.stop):
                raise CheckpointError(
                    f"`{name}` of parameter {last.of.name} has shape {tuple(tensor.shape)}, "
                    f"but its shard needs a contiguous one of at least {last.span.stop} elements."
                )


def check_state(value: Any, key: str = "state") -> None:
    """Check that the caller's state comes back from JSON as it went in (tuples come back as lists).

    Raises:
        CheckpointError: naming the key whose value is no dict, list, string, number, boolean or None
    """
    if isinstance(value, dict):
        for name, each in value.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{key} has the key {name!r}; keys of a saved state must be strings.")
            check_state(each, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            check_state(each, f"{key}[{place}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        allowed = "dicts, lists, strings, numbers, booleans and None"
        raise CheckpointError(f"{key} is a {type(value).__name__}; a saved state may hold {allowed}.")


def _check_names(folder: Path, saved: dict[str, Trainable], here: dict[str, Trainable]) -> None:
    missing = [name for name in here if name not in saved]
    foreign = [name for name in saved if name not in here]
    odd = [*(here[name] for name in missing), *(saved[name] for name in foreign)]
    if {of.layer for of in saved.values()} != {of.layer for of in here.values()}:
        keys = ["model.path", "adapter.target_modules", "adapter.lora_modules", "adapter.style"]
    else:  # the same layers with other things in them
        has_router, has_factor = (any((of.factor is Factor.ROUTER) == want for of in odd) for want in (True, False))
        keys = ["adapter.router", "adapter.num_experts"] * has_router + ["adapter.expert"] * has_factor
    remedy = f"Set {listing(keys)} {_AS_SAVED_OR_NEW}."
    if missing:
        raise CheckpointError(
            f"{folder} has no values for {listing(missing)}; it holds {listing(foreign or saved, 4)}. {remedy}"
        )
    if foreign:
        raise CheckpointError(f"{folder} holds {listing(foreign)}, which this recipe does not train. {remedy}")


def _shape_message(folder: Path, saved: Trainable, here: Trainable) -> str:
    message = f"{folder} holds {saved.name} with shape {saved.shape}, but this recipe makes it {here.shape}. "
    keys = _SHAPE_KEYS.get(here.factor, ())
    if len(keys) != len(here.shape) or len(here.shape) != len(saved.shape):
        return f"{message}Set the adapter section {_AS_SAVED_OR_NEW}."
    differing = [
        f"{key} = {was} (now {now})" for key, was, now in zip(keys, saved.shape, here.shape, strict=True) if was != now
    ]
    return f"{message}Set {', '.join(dict.fromkeys(differing))} {_AS_SAVED_OR_NEW}."


def _check_tensors(folder: Path, saved: dict[str, dict[str, str]], here: dict[str, dict[str, str]]) -> None:
    for name, wanted in here.items():
        found = saved[name]
        if found.keys() != wanted.keys():
            raise CheckpointError(
                f"{folder} holds {listing(sorted(found))} for {name}, but this recipe keeps "
                f"{listing(sorted(wanted))}. Set optim.name, optim.momentum and adapter.init {_AS_SAVED_OR_NEW}."
            )
        for tensor, dtype in wanted.items():
            if found[tensor] != dtype:
                raise CheckpointError(
                    f"{folder} holds `{tensor}` of {name} as {found[tensor]}, but here it is {dtype}; "
                    f"converting it would change the run. Keep the dtype {_AS_SAVED_OR_NEW}."
                )


def _all_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)  # both are nan when one element is; no copy of the tensor is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _dtypes() -> list[str]:
    return [str(dtype) for dtype in DTYPE_NAMES]
