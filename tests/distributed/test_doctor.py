"""What the doctor says of two ranks together."""

from __future__ import annotations

import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from dsmoelora.doctor.shared import all_reduce_speed, folder_is_shared, same_everywhere
from dsmoelora.errors import ConfigError
from dsmoelora.parallel import comm
from dsmoelora.planner import device_named
from dsmoelora.planner.devices import Efficiency
from launch import doctor
from tests.conftest import PoolFactory


def look_at_folder(common: str, own: list[str]) -> str:
    """The problem with a folder `common` whose rest depends on the rank, as on nodes with disks of their own."""
    return folder_is_shared(Path(common) / own[comm.rank()]).problem


def test_a_folder_must_be_the_same_for_all(tmp_path: Path, worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(look_at_folder, str(tmp_path), ["runs", "runs"]) == ["", ""]
    first, second = worker_pool(2).run(look_at_folder, str(tmp_path), ["mine", "yours"])
    assert (
        first == second and "not usable by rank 1 (No such file or directory)" in first and "all nodes share" in first
    )
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def compare(words: list[list[str]]) -> str:
    return same_everywhere("versions", words[comm.rank()]).problem


def test_versions_must_be_the_same_for_all(worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(compare, [["torch 1"], ["torch 1"]]) == ["", ""]
    (problem, again) = worker_pool(2).run(compare, [["torch 1", "numpy 1"], ["torch 2", "numpy 1"]])
    assert problem == again and "rank 1 and rank 0 differ in: torch 1, torch 2" in problem


def measure() -> tuple[str, str]:
    finding = all_reduce_speed()
    return finding.found, finding.problem


def test_the_speed_of_an_all_reduce_is_measured(worker_pool: PoolFactory) -> None:
    ((found, problem), _) = worker_pool(2).run(measure)
    assert float(found.split(" GB/s")[0]) > 0 and problem == ""
    assert measure() == ("one rank: nothing to send", "")


def see_the_doctor(*argv: str) -> str:
    sys.argv = ["doctor.py", *argv]
    try:
        doctor.main()
    except ConfigError as error:
        return str(error)
    return ""


def test_the_whole_visit(tmp_path: Path, worker_pool: PoolFactory) -> None:
    assert worker_pool(2).run(see_the_doctor, "--run-dir", str(tmp_path / "runs")) == ["", ""]
    for complaint in worker_pool(2).run(see_the_doctor, "--run-dir", "/proc/runs"):
        assert complaint.startswith("3 found:\n  rank 0: run.dir is /proc/runs, ") and "rank 1: run.dir" in complaint
        assert "shared folder: not usable by rank 0" in complaint


def test_a_measured_machine_can_be_planned_for(tmp_path: Path, worker_pool: PoolFactory) -> None:
    path = tmp_path / "here.yaml"
    assert worker_pool(2).run(see_the_doctor, "--calibrate", str(path)) == ["", ""]
    device = device_named(str(path))
    assert (device.name, device.ranks_per_node) == ("here", 2)
    assert device.efficiency == Efficiency()  # what is measured is what is reached
    assert device.peak_tflops > 0 and device.memory_gbs > 0
    # a sum over processes takes longer than an operation of one, and its bytes than a copy's
    assert device.in_node.latency_us > device.launch_us / 10
    assert 0 < device.in_node.bandwidth_gbs < 10 * device.memory_gbs
    assert device.overlaps is (get_accelerator().device_name() != "cpu")
    for complaint in worker_pool(2).run(see_the_doctor, "--calibrate", str(tmp_path / "nowhere" / "here.yaml")):
        assert complaint.startswith("--calibrate is ") and "a file of a folder that exists" in complaint
