"""Devices that a run can be planned for: `devices.yaml`, each value with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dsmoelora.errors import bad_value, listing

_FILE = Path(__file__).with_name("devices.yaml")
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: in `devices.yaml`
        memory_gib: what can be allocated at most
        context_gib: assumed for context, libraries and NCCL
        ranks_per_node: accelerators of a machine
        source: where the figures are from
    """

    name: str
    memory_gib: float
    context_gib: float
    ranks_per_node: int
    source: str


@cache
def _devices() -> dict[str, Device]:
    return {name: Device(name, **values) for name, values in yaml.safe_load(_FILE.read_text()).items()}


def device_names() -> list[str]:
    """Those that can be planned for."""
    return list(_devices())


def device_named(name: str) -> Device:
    """The device of a name.

    Raises:
        ConfigError: it is not in `devices.yaml`
    """
    if name not in _devices():
        raise bad_value("--gpu", name, f"one of {listing(device_names())}", f"Take the nearest, or add it to {_FILE}.")
    return _devices()[name]
