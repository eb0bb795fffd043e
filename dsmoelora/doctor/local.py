"""What one process can see: versions, accelerator, network settings, free disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsmoelora.config import Recipe
from dsmoelora.errors import ConfigError
from dsmoelora.parallel import comm
from dsmoelora.parallel.dtype import settle_dtype
from dsmoelora.parallel.versions import check_version, is_known_version
from dsmoelora.run.folder import existing_parent, is_open_to_all

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "numpy")
# Two packages that hurt each other at these versions, what happens, and where to read about it.
KNOWN_BAD = (
    ("torch", ">=2.6,<2.7.1", "deepspeed", ">=0.16", "NCCL hangs now and then (pytorch issue 153960)"),
    ("transformers", "==5.1.0", "deepspeed", ">0", "ZeRO-3 cannot load weights (transformers pull request 43780)"),
)
_MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One answer.

    Args:
        what: was looked at
        found: there
        problem: what is wrong with it and the remedy; empty when all is well
    """

    what: str
    found: str
    problem: str = ""


def local_findings(run_dir: Path, env: Mapping[str, str]) -> list[Finding]:
    """Everything that this process finds by itself.

    Args:
        run_dir: folder that shall hold the runs
        env: variables of this process
    """
    versions = installed_versions()
    return [
        *judged_versions(versions, _wanted_versions()),
        *bad_pairs(versions),
        *_four_bits(),
        *_accelerator(),
        *network(env, [name for _, name in socket.if_nameindex()]),
        *_disk(run_dir),
    ]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide about results and speed, without the build's name (`+cu128`)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def bad_pairs(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Two versions of `KNOWN_BAD` that are installed together."""
    for one, ones, other, others, what_happens in KNOWN_BAD:
        pair = ((one, ones), (other, others))
        known = all(versions.get(name, "missing") != "missing" for name, _ in pair)
        if known and all(SpecifierSet(spec).contains(versions[name], prereleases=True) for name, spec in pair):
            found = f"{one} {versions[one]}, {other} {versions[other]}"
            yield Finding("versions together", found, f"{what_happens}. Install the versions of constraints.txt.")


def _four_bits() -> Iterator[Finding]:
    """Whether a base can be kept in 4 bits (`model.quantize`); who does not want that need not have it."""
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("bases in 4 bits", "no: bitsandbytes is not installed (pip install 'dsmoelora[quant]')")
        return
    is_old = not SpecifierSet(">=0.50").contains(found, prereleases=True)
    yield Finding("bases in 4 bits", f"bitsandbytes {found}", "0.50 or newer is wanted." if is_old else "")


def network(env: Mapping[str, str], interfaces: Collection[str]) -> Iterator[Finding]:
    """Settings of NCCL and gloo that would hang a run, or make it talk to nobody.

    Args:
        env: variables of this process
        interfaces: names of this host's
    """
    if env.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        remedy = "a dead rank would leave the others waiting for ever. Unset it."
        yield Finding("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", remedy)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if variable in env:
            yield _named_interface(variable, env[variable], interfaces)
    several_nodes = int(env.get("LOCAL_WORLD_SIZE", "1")) < int(env.get("WORLD_SIZE", "1"))
    own = _address_of(socket.gethostname())
    problem = ""
    if several_nodes and own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in env:
        names = ", ".join(sorted(name for name in interfaces if name != "lo"))
        problem = (
            "gloo would listen there, where other nodes cannot reach it. Set GLOO_SOCKET_IFNAME to the interface that "
            f"connects the nodes, one of: {names}."
        )
    yield Finding("host", f"{socket.gethostname()} ({own or 'no address'})", problem)


def _named_interface(variable: str, value: str, interfaces: Collection[str]) -> Finding:
    """NCCL takes prefixes, `=` for an exact name and `^` for all but these; gloo takes names."""
    wanted = value.lstrip("=^").split(",")
    exact = variable.startswith("GLOO") or value.startswith("=")
    there = any(name == each if exact else name.startswith(each) for each in wanted for name in interfaces)
    if there or value.startswith("^"):
        return Finding(variable, value)
    return Finding(variable, value, f"no such interface here; there are {', '.join(sorted(interfaces))}. Correct it.")


def judged_versions(versions: Mapping[str, str], wanted: Mapping[str, SpecifierSet]) -> Iterator[Finding]:
    """Each version, and what is wrong where it is not one of the `wanted`."""
    for name, version in versions.items():
        problem, found = "", version
        if version == "missing":
            problem = f"it is not installed. Run: pip install --constraint constraints.txt {name}"
        elif name in wanted and not wanted[name].contains(version, prereleases=True):
            problem = f"setup.py wants {wanted[name]}. Run: make install"
        elif name == "deepspeed":
            try:
                check_version()
            except ConfigError as error:
                problem = str(error)
            if not is_known_version():
                found += " (not tested with; a run checks ZeRO's partitions when it starts)"
        yield Finding(name, found, problem)


def _wanted_versions() -> dict[str, SpecifierSet]:
    """What setup.py asks for, as the installation knows it; a clone that runs without being installed asks nothing."""
    try:
        found = [Requirement(text) for text in importlib.metadata.requires("dsmoelora") or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {each.name: each.specifier for each in found if each.marker is None}


def _accelerator() -> Iterator[Finding]:
    accelerator = get_accelerator()
    name, backend = accelerator.device_name(), accelerator.communication_backend_name()
    problem = ""
    if name == "cpu" and Path("/dev/nvidia0").exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
        reason = "this torch is built for the CPU" if torch.version.cuda is None else "torch cannot use the driver"
        problem = f"there is an NVIDIA GPU, but {reason}. Install a CUDA build that fits the driver (see nvidia-smi)."
    yield Finding("accelerator", f"{name}, {accelerator.device_count()} here", problem)
    yield Finding("model.dtype: auto", settle_dtype(Recipe()).why)
    found = backend
    if backend == "nccl":
        found += " " + ".".join(map(str, torch.cuda.nccl.version()))
    is_there = torch.distributed.is_backend_available(backend)
    yield Finding(
        "backend", found, "" if is_there else f"this torch is built without {backend}. Install another build."
    )


def _disk(run_dir: Path) -> Iterator[Finding]:
    parent = existing_parent(run_dir)
    free = shutil.disk_usage(parent).free
    problem = "" if free >= _MIN_FREE_BYTES else "less than 1 GiB. Make room, or choose another run.dir."
    if not os.access(parent, os.W_OK | os.X_OK):
        problem = f"{parent} is not writable. Choose another run.dir."
    elif run_dir.is_dir() and is_open_to_all(run_dir):
        problem = f"everybody may write into it. Close it: chmod o-w {run_dir}"
    yield Finding("run.dir", f"{run_dir}, {free / 2**30:.1f} GiB free", problem)


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def device_of_this_rank() -> str:
    """What no two ranks may share: the accelerator's identity; empty on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return ""
    if accelerator.device_name() == "cuda":
        return str(torch.cuda.get_device_properties(accelerator.current_device()).uuid)
    return f"{socket.gethostname()} {accelerator.current_device_name()} rank {comm.rank()}"
