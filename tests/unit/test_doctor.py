"""What the doctor says of versions and network settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from dsmoelora.doctor.local import bad_pairs, judged_versions, local_findings, network
from dsmoelora.parallel.versions import KNOWN_VERSIONS

ROOT = Path(__file__).parents[2]
GOOD = {"torch": "2.13.0", "deepspeed": KNOWN_VERSIONS[-1], "transformers": "5.23.0"}
INTERFACES = ["lo", "eth0", "ib0"]


def test_the_versions_of_constraints_are_fine() -> None:
    assert list(bad_pairs(pins("constraints.txt"))) == []


@pytest.mark.parametrize("change", [{"torch": "2.6.0"}, {"torch": "2.7.0"}, {"transformers": "5.1.0"}])
def test_versions_that_hurt_each_other_are_named(change: dict[str, str]) -> None:
    (finding,) = bad_pairs(GOOD | change)
    ((name, version),) = change.items()
    assert f"{name} {version}" in finding.found and f"deepspeed {GOOD['deepspeed']}" in finding.found
    assert "constraints.txt" in finding.problem


def test_a_pair_of_which_one_is_missing_hurts_nobody() -> None:
    assert list(bad_pairs({"torch": "2.6.0", "deepspeed": "missing"})) == []


def test_versions_are_judged_by_what_setup_wants() -> None:
    wanted = {"torch": SpecifierSet(">=2.13,<2.14")}
    versions = {"torch": "2.14.0", "numpy": "missing", "deepspeed": GOOD["deepspeed"]}
    problems = {finding.what: finding.problem for finding in judged_versions(versions, wanted)}
    assert problems["torch"].startswith("setup.py wants ") and "not installed" in problems["numpy"]
    assert problems["deepspeed"] == ""


@pytest.mark.parametrize(("version", "is_wrong"), [("0.19.3", True), ("0.19.99", False)])
def test_an_old_deepspeed_is_wrong_and_an_unknown_one_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, is_wrong: bool
) -> None:
    monkeypatch.setattr("deepspeed.__version__", version)
    (finding,) = judged_versions({"deepspeed": version}, {})
    assert ("0.19.4 or newer" in finding.problem) is is_wrong
    assert "not tested with" in finding.found


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_oldest_tested_versions_are_those_that_setup_lets_in() -> None:
    oldest = pins("tests/versions/oldest.txt")
    bounds = dict(re.findall(r'^    "([a-z]+)>=([0-9.]+),<[^"]*"', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    for name in ("torch", "deepspeed", "transformers"):
        assert oldest[name].removesuffix(".0") == bounds[name]
    assert oldest["deepspeed"] == KNOWN_VERSIONS[0]
    assert pins("tests/versions/middle.txt")["deepspeed"] in KNOWN_VERSIONS
    assert pins("constraints.txt")["deepspeed"] == KNOWN_VERSIONS[-1]


def problems_of(env: dict[str, str]) -> dict[str, str]:
    return {finding.what: finding.problem for finding in network(env, INTERFACES) if finding.problem}


@pytest.mark.parametrize(
    ("env", "is_wrong"),
    [
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, True),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, False),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, False),
        ({"GLOO_SOCKET_IFNAME": "eth"}, True),  # gloo takes whole names
        ({"NCCL_SOCKET_IFNAME": "eth"}, False),  # NCCL takes prefixes
        ({"NCCL_SOCKET_IFNAME": "=eth"}, True),
        ({"NCCL_SOCKET_IFNAME": "ens,ib"}, False),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, False),
        ({"NCCL_SOCKET_IFNAME": "ens5"}, True),
    ],
)
def test_network_settings(env: dict[str, str], is_wrong: bool) -> None:
    assert list(problems_of(env)) == (list(env) if is_wrong else [])


@pytest.mark.parametrize(
    ("address", "world_size", "is_wrong"),
    [("127.0.1.1", "4", True), ("127.0.1.1", "2", False), ("10.0.0.1", "4", False)],
)
def test_a_loopback_address_is_wrong_on_several_nodes(
    monkeypatch: pytest.MonkeyPatch, address: str, world_size: str, is_wrong: bool
) -> None:
    monkeypatch.setattr("socket.gethostbyname", lambda _: address)
    env = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": "2"}
    assert ("GLOO_SOCKET_IFNAME to the interface" in problems_of(env).get("host", "")) is is_wrong
    assert problems_of(env | {"GLOO_SOCKET_IFNAME": "eth0"}) == {}


def test_a_folder_that_is_open_to_all_or_full_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> str:
        return next(finding.problem for finding in local_findings(tmp_path, {}) if finding.what == "run.dir")

    assert problem() == ""
    tmp_path.chmod(0o777)
    assert "chmod o-w" in problem()
    tmp_path.chmod(0o755)
    monkeypatch.setattr("dsmoelora.doctor.local._MIN_FREE_BYTES", 1 << 80)
    assert "Make room" in problem()
