"""Threads for the steps before the search: calls that keep the caller's context and can be stopped."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """A call that was not begun because its pool was closed.

    No Exception: DSPy takes any of those for a failure of the LM, and goes on.
    """


class Threads:
    """A pool of threads; leaving it stops what has not begun and waits for what has.

    Args:
        number: Calls at a time.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._executor = ThreadPoolExecutor(number, thread_name_prefix="mpromptune-step")
        self._stopped = threading.Event()

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Queues a call, to be run in a copy of the caller's context (where DSPy's settings live)."""
        context = contextvars.copy_context()
        return self._executor.submit(context.run, self._call, function, *args, **kwargs)

    def check(self) -> None:
        """Ends a chain of calls that nobody waits for any more.

        Raises:
            Stopped: The pool has been closed.
        """
        if self._stopped.is_set():
            raise Stopped

    def close(self) -> None:
        """Starts nothing more, and waits for the calls that are under way."""
        self._stopped.set()
        # Not `cancel_futures`: nobody who is in `wait` for a future is told of its cancellation.
        self._executor.shutdown(wait=True)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        self.check()
        return function(*args, **kwargs)
