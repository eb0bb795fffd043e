"""Devices: the entries that come with the planner, and those of a user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dsmoelora.errors import ConfigError
from dsmoelora.planner import device_called, device_named, device_names

ENTRY = {
    "memory_gib": 8,
    "context_gib": 0.5,
    "ranks_per_node": 2,
    "peak_tflops": 0.05,
    "memory_gbs": 10,
    "host_gbs": 10,
    "in_node": {"bandwidth_gbs": 1, "latency_us": 100},
    "between_nodes": {"bandwidth_gbs": 0.1, "latency_us": 200},
    "source": "measured",
}


def test_devices_are_plausible_and_say_where_their_figures_are_from() -> None:
    for name in device_names():
        device = device_named(name)
        assert device.source and device.names
        assert 0 < device.context_gib < device.memory_gib
        assert device.between_nodes.bandwidth_gbs < device.in_node.bandwidth_gbs < device.memory_gbs
        assert device.in_node.latency_us < device.between_nodes.latency_us
        shares = (device.efficiency.compute, device.efficiency.memory, device.efficiency.network)
        assert all(0 < share < 1 for share in shares)


def test_peaks_follow_from_the_units_of_each_chip() -> None:
    """Multiprocessors x operations a clock x boost clock, of the makers' whitepapers (products without sparsity)."""
    units = {"a100-80": (108, 2048, 1.41), "h100": (132, 4096, 1.83), "rtx-4090": (128, 512, 2.52)}
    for name, (count, operations, clock_ghz) in units.items():
        assert device_named(name).peak_tflops == pytest.approx(count * operations * clock_ghz / 1e3, rel=0.01)


def test_a_device_is_found_by_the_name_that_torch_has_for_it() -> None:
    h100, a100 = device_called("NVIDIA H100 80GB HBM3"), device_called("NVIDIA A100-SXM4-40GB")
    assert h100 is not None and h100.name == "h100"
    assert a100 is not None and a100.name == "a100-40"
    assert device_called("NVIDIA H100 PCIe") is None  # it has another peak


def test_a_file_describes_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"mine": ENTRY}))
    device = device_named(str(path))
    assert (device.name, device.peak_tflops, device.between_nodes.latency_us) == ("mine", 0.05, 200)
    assert device.efficiency.compute == 1  # what is measured is what there is


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ({}, "values to unpack"),
        ({"mine": ENTRY | {"peak_tflops": "much"}}, "peak_tflops is 'much', no number above 0"),
        ({"mine": ENTRY | {"memory_gbs": 0}}, "memory_gbs is 0"),
        ({"mine": ENTRY | {"colour": "green"}}, "colour"),
        ({"mine": {"memory_gib": 8}}, "peak_tflops"),
        ({"mine": ENTRY | {"in_node": {"bandwidth_gbs": 1}}}, "latency_us"),
        ({"one": ENTRY, "two": ENTRY}, "too many values"),
    ],
)
def test_a_file_that_describes_none_is_named(content: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=reason) as caught:
        device_named(str(path))
    assert "--gpu is" in str(caught.value) and "--calibrate" in str(caught.value)
