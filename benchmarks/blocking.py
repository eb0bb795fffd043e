"""The token exchange without its overlap, to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import deepspeed.comm as dist

COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor")  # of the exchange


@contextmanager
def collectives_through(call: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `call(collective, *args, **kwargs)` takes the place of each collective."""
    with (
        mock.patch.object(dist, COLLECTIVES[0], partial(call, dist.all_to_all_single)),
        mock.patch.object(dist, COLLECTIVES[1], partial(call, dist.all_gather_into_tensor)),
    ):
        yield


def waited_for(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The collective, over when this returns."""
    handle = collective(*args, **kwargs)
    if handle is not None:
        handle.wait()
    return handle
