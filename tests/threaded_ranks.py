"""Ranks as threads of one process: runs code written against `parallel.comm` for many world sizes in milliseconds."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from dsmoelora.errors import UserError


class ThreadedComm:
    """Stands in for the module `dsmoelora.parallel.comm`; objects travel as JSON here too."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._own = threading.local()
        self._slots: list[Any] = [None] * world_size

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """Call `fn(rank)` on every rank at once.

        Returns:
            By rank what it returned, or the exception that it raised.
        """
        outcomes: list[Any] = [None] * self._world_size

        def work(rank: int) -> None:
            self._own.rank = rank
            try:
                outcomes[rank] = fn(rank)
            except BaseException as error:
                outcomes[rank] = error
                if not isinstance(error, UserError):
                    self._barrier.abort()  # nobody shall wait for a rank that is gone

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def rank(self) -> int:
        return self._own.rank

    def world_size(self) -> int:
        return self._world_size

    def barrier(self) -> None:
        self._barrier.wait()

    def gather_objects(self, obj: Any) -> list[Any] | None:
        everyone = self._exchange(json.dumps(obj))
        return [json.loads(text) for text in everyone] if self.rank() == 0 else None

    def all_gather_objects(self, obj: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(obj))]

    def broadcast_object(self, obj: Any) -> Any:
        return json.loads(self._exchange(json.dumps(obj) if self.rank() == 0 else "")[0])

    def broadcast_tensor(self, tensor: Any) -> Any:
        return self._exchange(tensor)[0].clone()

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self._exchange([float(value) for value in values]), strict=True)]

    def together(self, fn: Callable[[], Any]) -> Any:
        result, own = None, None
        try:
            result = fn()
        except Exception as error:
            own = error
        messages = self._exchange(None if own is None else str(own))
        if own is not None:
            raise own
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            raise UserError(f"rank {failed[0]}: {messages[failed[0]]}")
        return result

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank()] = value
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()  # nobody writes the next value before all have read this one
        return everyone
