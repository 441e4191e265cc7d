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
    """A pool of threads; leaving its context starts no more calls and waits for those in flight.

    After an error or an interrupt the wait is short: calls still in flight then make no further LM call (see
    `interrupts.current_stop`), and the interpreter does not wait for them when it exits.

    Args:
        number: Number of threads.
        grace: Seconds that calls in flight may still take after an error.
        retry: How infrastructure errors are retried.
        admits: Whether another attempt may be made.

    Attributes:
        attempts: Makes a call with these retries, in the calling thread.
        failure: The error after which no other attempt can succeed; then none is made.
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
        self._ending = threading.Event()  # no call begins any more
        self._stopped = threading.Event()  # and the results of calls in flight are no longer needed
        self.failure: BaseException | None = None
        judged = self._judge, retry or RetryPolicy(), retry_after
        self.attempts = Attempts(*judged, number, self._stopped, admits)
        self._counting = threading.Lock()
        self._unfinished = 0
        self._fillers: Iterator[Callable[[], object]] = iter(())

    @property
    def load(self) -> Load:
        """The number of busy threads, and the limit of the throttle."""
        return replace(self.attempts.load, running=min(self._unfinished, self._number))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a call, which runs in a copy of the caller's context (with DSPy's settings)."""
        with self._counting:
            return self._queued(contextvars.copy_context(), fn, *args, **kwargs)

    def fill(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make these calls in order on threads that are otherwise idle; each handles its own errors.

        Each is taken from ``calls`` when a thread is idle, and runs in a copy of this context.
        """
        with self._counting:
            self._fillers, self._context = iter(calls), contextvars.copy_context()
            self._fill()

    def end(self) -> None:
        """Start no more calls; those in flight continue."""
        with self._counting:  # while no call is being submitted
            self._ending.set()

    def finish(self, within: float | None = None) -> None:
        """Start no more calls, and wait for those in flight, which are paid for.

        Args:
            within: Longest wait in seconds; calls still in flight then make no further LM call.
        """
        self.end()
        # Not `cancel_futures`: threads in `wait` would not be notified of the cancellation.
        self.shutdown(wait=False)
        self.join(within)
        self._stopped.set()

    def close(self, within: float | None = None) -> None:
        """Like `finish`, but calls in flight make no further LM call; only the first `close` waits."""
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
