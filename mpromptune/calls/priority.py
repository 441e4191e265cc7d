"""Two kinds of calls on one executor: those that are waited for, and those that fill idle workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class Priority(Generic[T]):
    """Hands calls to an executor; those for idle workers only when it has fewer calls than workers.

    Args:
        executor: Runs them in the order in which it gets them.
        number: Its workers.
    """

    def __init__(self, executor: Executor, number: int) -> None:
        self._executor = executor
        self._number = number
        self._lock = threading.RLock()
        self._unfinished = 0
        self._is_filling = False
        self._for_idle: deque[tuple[Future[T], Callable[[], T]]] = deque()

    def submit(self, call: Callable[[], T], idle: bool = False) -> Future[T]:
        """Queues a call.

        Args:
            call: The call.
            idle: Whether it is for a worker that has nothing else to do.
        """
        if not idle:
            with self._lock:
                self._unfinished += 1
            future = self._executor.submit(call)
            future.add_done_callback(self._ended)
            return future
        waiting: Future[T] = Future()
        with self._lock:
            self._for_idle.append((waiting, call))
            self._fill()
        return waiting

    def _ended(self, _: Future[T]) -> None:
        with self._lock:
            self._unfinished -= 1
            self._fill()

    def _fill(self) -> None:
        """Has idle workers take what is there for them; a call that ends at once is not a deeper level."""
        if self._is_filling:
            return
        self._is_filling = True
        try:
            while self._for_idle and self._unfinished < self._number:
                waiting, call = self._for_idle.popleft()
                if waiting.set_running_or_notify_cancel():
                    self.submit(call).add_done_callback(partial(_hand_on, waiting))
        finally:
            self._is_filling = False


def _hand_on(waiting: Future[T], done: Future[T]) -> None:
    error = CancelledError() if done.cancelled() else done.exception()
    if error is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(done.result())
