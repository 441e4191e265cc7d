"""Threads for the steps before the search: calls that keep the caller's context and can be stopped."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from mpromptune.execution.attempts import Attempts, Load, RetryPolicy, Verdict
from mpromptune.execution.interrupts import GRACE, Stopped, stoppable
from mpromptune.execution.pool import DaemonThreads
from mpromptune.lms.errors import classify, retry_after

T = TypeVar("T")


class Threads(DaemonThreads):
    """A pool of threads; leaving it stops what has not begun and waits for what has.

    After an error or an interrupt the wait is short: what is still under way then makes no further
    LM call (see `interrupts.current_stop`), and does not hold up the interpreter's end.

    Args:
        number: Calls at a time.
        grace: Seconds that calls under way are left after an error.
        retry: How often and how patiently errors of the infrastructure are retried.
        admits: Whether another attempt may be made.

    Attributes:
        attempts: Makes a call with these retries, in the thread that asks for it.
        failure: What an attempt failed with after which no other can succeed; then none is made.
    """

    def __init__(
        self,
        number: int,
        grace: float = GRACE,
        retry: RetryPolicy | None = None,
        admits: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(number, "mpromptune-step")
        self.grace = grace
        self._ending = threading.Event()  # nothing more begins
        self._stopped = threading.Event()  # nor does anybody wait for what has begun
        self.failure: BaseException | None = None
        judged = self._judge, retry or RetryPolicy(), retry_after
        self.attempts = Attempts(*judged, number, self._stopped, admits)
        self._counting = threading.Lock()
        self._unfinished = 0
        self._fillers: Iterator[Callable[[], object]] = iter(())

    @property
    def load(self) -> Load:
        """Threads that have something to do, and what the retries leave them."""
        return replace(self.attempts.load, running=min(self._unfinished, self._number))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queues a call, to be run in a copy of the caller's context (where DSPy's settings live)."""
        with self._counting:
            return self._queued(contextvars.copy_context(), fn, *args, **kwargs)

    def fill(self, calls: Iterable[Callable[[], object]]) -> None:
        """Has the threads that nothing else needs make these calls, in order; each handles its errors.

        They are taken from ``calls`` one by one when a thread is free, in a copy of this context.
        """
        with self._counting:
            self._fillers, self._context = iter(calls), contextvars.copy_context()
            self._fill()

    def end(self) -> None:
        """Starts nothing more; what is under way goes on."""
        with self._counting:  # no call is being submitted
            self._ending.set()

    def finish(self, within: float | None = None) -> None:
        """Starts nothing more, and lets the calls under way come to their end: they are paid for.

        Args:
            within: Seconds to wait at most; what still runs then asks no LM any more.
        """
        self.end()
        # Not `cancel_futures`: nobody who is in `wait` for a future is told of its cancellation.
        self.shutdown(wait=False)
        self.join(within)
        self._stopped.set()

    def close(self, within: float | None = None) -> None:
        """As `finish`, but what is under way asks no LM any more, and is waited for the first time only."""
        is_first = not self._closed
        self._stopped.set()
        if is_first:
            self.finish(within)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(None if kind is None else self.grace)

    def _judge(self, error: BaseException) -> Verdict:
        verdict = classify(error)
        if verdict is Verdict.STOP:
            self.failure = self.failure or error
            self._ending.set()
            self._stopped.set()
        return verdict

    def _queued(
        self, context: contextvars.Context, call: Callable[..., T], *args: Any, **kwargs: Any
    ) -> Future[T]:
        future = super().submit(context.run, self._run, call, *args, **kwargs)
        self._unfinished += 1
        return future

    def _fill(self) -> None:
        while self._unfinished < self._number and not self._ending.is_set():
            call = next(self._fillers, None)
            if call is None:
                break
            self._queued(self._context.copy(), call)

    def _run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            if self._ending.is_set():
                raise Stopped
            with stoppable(self._stopped.is_set):
                return call(*args, **kwargs)
        finally:
            with self._counting:
                self._unfinished -= 1
                self._fill()
