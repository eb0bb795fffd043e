"""Devices that a run can be planned for: `devices.yaml`, each value with its source, or a file of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dsmoelora.config.dtype import DTYPES, DtypeName
from dsmoelora.errors import ConfigError, bad_value, listing

_FILE = Path(__file__).with_name("devices.yaml")
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Link:
    """Between two ranks.

    Args:
        bandwidth_gbs: of a rank in one direction, 10^9 bytes a second
        latency_us: microseconds of a hop
    """

    bandwidth_gbs: float
    latency_us: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of the nominal figures that a plan reckons with; all 1 where the figures are measured.

    Args:
        compute: of `peak_tflops`
        memory: of `memory_gbs`
        network: of the links' bandwidth
    """

    compute: float = 1.0
    memory: float = 1.0
    network: float = 1.0


@dataclass(frozen=True)
class Device:
    """One accelerator; the head of `devices.yaml` says where such figures come from.

    Args:
        name: in `devices.yaml`
        memory_gib: what can be allocated at most
        context_gib: assumed for context, libraries and NCCL
        ranks_per_node: accelerators of a machine
        peak_tflops: products in `dtype`, 10^12 operations a second
        memory_gbs: of its memory, 10^9 bytes a second
        host_gbs: to or from the host, 10^9 bytes a second
        in_node: link of two ranks of a machine
        between_nodes: link of two ranks of two machines
        source: where the figures are from
        efficiency: shares of them
        launch_us: assumed for the host's part of an operation: Python, autograd, views, the driver; on AMD EPYC (Zen 3)
            without a GPU `launch/doctor.py --calibrate` measures 27
        overlaps: it computes while it communicates
        dtype: of the products that `peak_tflops` counts
        names: as torch calls it
    """

    name: str
    memory_gib: float
    context_gib: float
    ranks_per_node: int
    peak_tflops: float
    memory_gbs: float
    host_gbs: float
    in_node: Link
    between_nodes: Link
    source: str
    efficiency: Efficiency = Efficiency()
    launch_us: float = 20.0
    overlaps: bool = True
    dtype: DtypeName = "bf16"
    names: list[str] = field(default_factory=list)

    @staticmethod
    def of(name: str, values: dict[str, Any]) -> Device:
        """From an entry of a file.

        Raises:
            TypeError: a value is missing, unknown or no number
        """
        links: dict[str, Any] = {key: Link(**values[key]) for key in ("in_node", "between_nodes") if key in values}
        device = Device(name, **values | links | {"efficiency": Efficiency(**values.get("efficiency", {}))})
        if device.dtype not in DTYPES:
            raise TypeError(f"dtype is {device.dtype!r}, not one of {listing(DTYPES)}")
        for owner in (device, device.in_node, device.between_nodes, device.efficiency):
            for one in fields(owner):
                value = getattr(owner, one.name)
                if one.type in ("float", "int") and not (isinstance(value, int | float) and value > 0):
                    raise TypeError(f"{one.name} is {value!r}, no number above 0")
        return device


@cache
def _devices() -> dict[str, Device]:
    return {name: Device.of(name, values) for name, values in yaml.safe_load(_FILE.read_text()).items()}


def device_names() -> list[str]:
    """Those that can be planned for."""
    return list(_devices())


def device_named(name: str, key: str = "--gpu") -> Device:
    """The device of a name, or the one that a file describes.

    Args:
        name: in `devices.yaml`, or the path of a file that ends on `.yaml` and has one entry as in there
        key: what the user has named it by

    Raises:
        ConfigError: there is no such device, or the file describes none
    """
    if name.endswith((".yaml", ".yml")):
        return _of_file(Path(name), key)
    if name not in _devices():
        remedy = "Take the nearest, or measure this machine: python launch/doctor.py --calibrate mine.yaml."
        raise bad_value(key, name, f"one of {listing(device_names())}, or a .yaml file with such an entry", remedy)
    return _devices()[name]


def device_called(torch_name: str) -> Device | None:
    """The device that torch calls so; None where `devices.yaml` has no such name."""
    return next((device for device in _devices().values() if torch_name in device.names), None)


def _of_file(path: Path, key: str) -> Device:
    try:
        ((name, values),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
        return Device.of(str(name), values)
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ConfigError(
            f"{key} is {str(path)!r}, which does not describe a device ({reason}). It must hold one entry "
            f"as those of {_FILE}. Write one with: python launch/doctor.py --calibrate {path}"
        ) from None
