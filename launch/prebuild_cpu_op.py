"""Compiles the shared-memory operator that DeepSpeed uses between CPU ranks, once, before a run needs it.

    python launch/prebuild_cpu_op.py

DeepSpeed compiles it in silence at the first start of the process group (about half a minute). When that start is
killed half-way, a `lock` file stays in the cache of torch extensions and every later process waits for it without a
word. Building it here leaves nothing to build later, and clears such a lock away. On a machine with GPUs there is
nothing to do.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

OP_NAME = "deepspeed_shm_comm"


def extensions_dir() -> Path:
    """Where torch keeps compiled extensions: TORCH_EXTENSIONS_DIR, or a folder of the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    from torch.utils.cpp_extension import _get_build_directory  # the one place that knows torch's naming rule

    return Path(_get_build_directory(OP_NAME, verbose=False)).parent


def prebuild(folder: Path) -> None:
    """Build the operator below `folder` unless it is there. Calls from several processes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{OP_NAME}.prebuild").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the kernel frees it when its holder dies
        remove_dead_lock(folder)
        if is_built(folder):
            return
        from deepspeed.accelerator import get_accelerator

        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is None or not builder.is_compatible():
            return  # a GPU, or a platform on which DeepSpeed uses plain gloo
        print("Compiling DeepSpeed's shared-memory operator for CPU ranks, once (about half a minute) ...", flush=True)
        builder.load(verbose=False)


def is_built(folder: Path) -> bool:
    """Whether the operator lies ready below `folder` and nobody is building it."""
    return (folder / OP_NAME / f"{OP_NAME}.so").exists() and not (folder / OP_NAME / "lock").exists()


def remove_dead_lock(folder: Path) -> bool:
    """Remove a lock whose builder is gone; true if there was one.

    A living builder keeps the file open. It closes the file a moment before removing it, hence the second look.
    """
    lock = folder / OP_NAME / "lock"
    for _ in range(2):
        if not lock.exists() or _is_open_somewhere(lock):
            return False
        time.sleep(0.5)
    lock.unlink(missing_ok=True)
    print(f"Removed {lock}: the build that it belonged to is gone.", flush=True)
    return True


def _is_open_somewhere(path: Path) -> bool:
    """Whether a process of this user and machine has the file open, by Linux's /proc."""
    target = path.resolve()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == target:
                return True
        except OSError:  # the process ended, or is another user's
            continue
    return False


if __name__ == "__main__":
    prebuild(extensions_dir())
