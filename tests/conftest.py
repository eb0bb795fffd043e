"""What all tests share: an environment of their own, and worker processes that live as long as the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_distributed import WorkerPool, base_environment

CACHE = Path(__file__).parent.parent / ".cache"
PoolFactory = Callable[[int], WorkerPool]


def pytest_configure() -> None:
    """Set the environment before anything imports torch or transformers; the programs that tests start inherit it."""
    os.environ.update(base_environment())
    # Folders of our own: nothing of the user's caches decides about a test, and no test writes there.
    os.environ["HF_HOME"] = str(CACHE / "huggingface")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONHASHSEED": "0"}


release = pytest.mark.release  # guards a release, not every commit: `make test-all`, not `make test`


def thorough(*values: Any) -> Any:
    """One case of a `parametrize` that guards a release."""
    return pytest.param(*values, marks=release)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[PoolFactory]:
    """`worker_pool(world_size)` is the session's pool of that size, started at its first call."""
    pools: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        if world_size not in pools:
            pools[world_size] = WorkerPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without bf16. A packed model has no `float()`: what it holds are bytes."""
    monkeypatch.setattr("dsmoelora.model.loading.best_dtype", lambda device: "fp32")
