"""Threads that score pairs of configuration and example: attempts with timeouts, and their outcomes."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from mpromptune.errors import (
    CallTimeoutError,
    ExecutorBrokenError,
    ScoreError,
    TravelError,
    WorkerLostError,
    as_real,
    beginning,
)
from mpromptune.execution.attempts import Attempts, Classify, Load, RetryAfter, RetryPolicy, Verdict, no_hint
from mpromptune.execution.interrupts import (
    SLICE,
    Stopped,
    chained,
    contained,
    deferred,
    is_over,
    may_end,
    result_of,
    stoppable,
)
from mpromptune.execution.notes import Noted, note_of
from mpromptune.execution.usage import Meter, Usage, current_meter, metered, record

logger = logging.getLogger(__name__)

T = TypeVar("T")
Score = Callable[[dict[str, int], int], float]
Keep = Callable[["Outcome"], None]

# NOTE: most characters of a wrong score in a message; enough to recognise it.
_SHOWN = 200
# These are one class since Python 3.11.
_TIMEOUTS = TimeoutError | futures.TimeoutError | asyncio.TimeoutError


class DaemonThreads(Executor):
    """A pool of daemon threads, each started when it is first needed.

    This is own code because the interpreter, when it exits, waits for all threads of a `ThreadPoolExecutor`,
    so one call that hangs would keep an interrupted process alive.
    """

    def __init__(self, number: int, name: str = "mpromptune") -> None:
        self._number = number
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a call."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._queue.put((future, partial(fn, *args, **kwargs)))
            if len(self._threads) < self._number:
                with deferred():  # a thread missing in the list would never end
                    self._threads.append(_start(self._work, f"{self._name}_{len(self._threads)}"))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; ``cancel_futures`` cancels those that have not begun."""
        with self._lock:
            already, self._closed = self._closed, True
            for future in self._waiting() if cancel_futures else ():
                future.cancel()
            for _ in self._threads if not already or cancel_futures else ():
                self._queue.put(None)
        if wait:
            self.join()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the threads to end, at most ``timeout`` seconds; an interrupt can end the waiting.

        It also ends when the result of this context is no longer needed (`interrupts.stoppable`).
        """
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        for thread in self._threads:
            while thread.is_alive() and not is_over() and (left := deadline - time.monotonic()) > 0:
                thread.join(min(SLICE, left))

    def _waiting(self) -> Iterator[Future[Any]]:
        """Remove the calls that have not begun from the queue, and yield their futures."""
        with suppress(queue.Empty):
            while True:
                if (item := self._queue.get_nowait()) is not None:
                    yield item[0]

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            _settle(*item)
            del item  # otherwise the last result would stay in memory until the next call


def in_daemon(call: Callable[[], T]) -> Future[T]:
    """Start a call in a new daemon thread."""
    future: Future[T] = Future()
    _start(partial(_settle, future, call), "mpromptune-call")
    return future


def within(timeout: float, call: Callable[[], T], stopped: Callable[[], bool]) -> T:
    """The result of a call in another thread, where nothing more begins when ``stopped()`` or too late.

    Raises:
        CallTimeoutError: There is no result within ``timeout`` seconds, not counting waits on purpose.
    """
    given_up = threading.Event()
    with stoppable(stopped, given_up.is_set):
        future = in_daemon(partial(contextvars.copy_context().run, call))
    if not _is_done_within(timeout, future):
        given_up.set()
        raise CallTimeoutError(f"no answer within {timeout:g} s")
    return future.result()


def in_time(call: Callable[[], T]) -> T:
    """The result of a call that may hang; if this context has stops, it is made in another thread.

    Raises:
        Stopped: The result of this context is no longer needed (`interrupts.stoppable`).
    """
    if not may_end():
        return call()
    return result_of(in_daemon(partial(contextvars.copy_context().run, call)))


def _settle(future: Future[T], call: Callable[[], T]) -> None:
    """Make the call of a future unless the future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised again by `future.result()`
        future.set_exception(error)
    else:
        future.set_result(result)


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


@dataclass(frozen=True)
class Outcome:
    """The outcome of one work item: a score, an error, or neither if the run was stopped.

    Attributes:
        example: The example.
        score: Its score.
        error: The error of the last attempt.
        order: Its position in the order in which items ended; -1 for one known before the run.
        usage: Usage of all attempts.
        note: What the score function said about the call beside its score (see `Noted`), or None.
    """

    example: int
    score: float | None = None
    error: BaseException | None = None
    order: int = -1
    usage: Usage = field(default_factory=Usage)
    note: Any = None


def outcome_of(example: int, future: Future[Outcome]) -> Outcome:
    """The outcome of a call; one without score and error if the call has not ended."""
    return future.result() if future.done() else Outcome(example)


def is_cut_short(outcomes: Iterable[Outcome]) -> bool:
    """Whether some calls were not made, so that another run should still make them."""
    return any(outcome.score is None and outcome.error is None for outcome in outcomes)


def scores_of(calls: Iterable[Future[Outcome]]) -> dict[int, float]:
    """Example to score, for the calls that are done."""
    done = [f.result() for f in calls if f.done() and not f.cancelled() and not f.exception()]
    return {outcome.example: outcome.score for outcome in done if outcome.score is not None}


class Workers:
    """Scores pairs of configuration and example on an executor of this process.

    Every item runs in a copy of the caller's context, so it has its context variables (DSPy's settings among
    them), and calls ``admits`` before it spends anything.

    Attributes:
        stopped: Set when nothing more may begin.
        fatal: The error of ``score`` that stopped the workers, if there was one.
    """

    def __init__(
        self,
        score: Score,
        executor: Executor,
        classify: Classify | None = None,
        retry: RetryPolicy | None = None,
        retry_after: RetryAfter = no_hint,
        num_threads: int = 8,
        admits: Callable[[], bool] = lambda: True,
        stopped: threading.Event | None = None,
    ) -> None:
        self._score = partial(contained, score)
        self._executor = executor
        self._classify = classify or classify_builtin
        self._retry = retry or RetryPolicy()
        self.stopped = stopped or threading.Event()
        self.fatal: Exception | None = None
        judged = self._judge, self._retry, retry_after
        self._attempts = Attempts(*judged, num_threads, self.stopped, admits)
        self._ended = itertools.count()

    @property
    def load(self) -> Load:
        """The attempts in flight now, and their limit."""
        return self._attempts.load

    def submit(
        self,
        params: Mapping[str, int],
        example: int,
        keep: Keep | None = None,
        after: Future[bool] | None = None,
    ) -> Future[Outcome]:
        """Queue one item; an error of ``score`` is part of the outcome and not raised by the future.

        Args:
            params: The configuration.
            example: The example.
            keep: Called with the outcome, in the worker, before the future is done.
            after: Whether the item can be scored at all; it is queued when this is known.
        """
        context = contextvars.copy_context()
        call = partial(context.run, self._measure, keep, dict(params), example)
        if after is None:
            return self._executor.submit(call)
        return chained(after, partial(self._executor.submit, call), Outcome(example))

    def verdict(self, outcome: Outcome) -> Verdict | None:
        """The verdict on a failed outcome; None for one that was scored or skipped."""
        return None if outcome.error is None else self._judge(outcome.error)

    def _judge(self, error: BaseException) -> Verdict:
        if isinstance(error, CallTimeoutError | WorkerLostError):
            return Verdict.RETRY
        if isinstance(error, ExecutorBrokenError | TravelError):
            return Verdict.STOP
        return self._classify(error)

    def _measure(self, keep: Keep | None, params: dict[str, int], example: int) -> Outcome:
        began = time.monotonic()
        with metered() as meter:
            outcome = self._outcome(params, example)
            if meter.total.program_calls:
                record(Usage(seconds=time.monotonic() - began))
        outcome = replace(outcome, usage=meter.total)
        if keep is not None:
            keep(outcome)
        return outcome

    def _outcome(self, params: dict[str, int], example: int) -> Outcome:
        try:
            score = self._attempts(partial(self._attempt, params, example))
        except Stopped:
            return Outcome(example)
        except Exception as error:  # noqa: BLE001 - every error of `score` is judged
            if self._judge(error) is Verdict.STOP:
                self.fatal = self.fatal or error
                self.stopped.set()
            return Outcome(example, error=error, order=next(self._ended), note=note_of(error))
        return Outcome(example, score=float(score), order=next(self._ended), note=note_of(score))

    def _attempt(self, params: dict[str, int], example: int) -> float:
        record(Usage(program_calls=1))
        timeout = self._retry.timeout
        if timeout is None:
            with stoppable(self.stopped.is_set):
                return as_score(self._score(params, example))
        try:
            return as_score(within(timeout, partial(self._score, params, example), self.stopped.is_set))
        except CallTimeoutError:
            logger.warning(
                "Example %d with %s gave no answer within %g s. This attempt is paid for, as are further "
                "ones; there are at most %d attempts.",
                *(example, params, timeout, self._retry.attempts),
            )
            raise


def _is_done_within(timeout: float, future: Future[Any]) -> bool:
    """Whether the call ends in time; waiting on purpose (for limits, equal requests) does not count."""
    meter, began = current_meter() or Meter(), time.monotonic()
    before = meter.waited
    while not future.done():
        left = timeout + (meter.waited - before) - (time.monotonic() - began)
        if left <= 0:
            return False
        wait([future], left)
    return True


def classify_builtin(error: BaseException) -> Verdict:
    """The default verdict: network errors and timeouts are retried, an invalid score stops the run."""
    if isinstance(error, ConnectionError | _TIMEOUTS):
        return Verdict.RETRY
    if isinstance(error, ScoreError):
        return Verdict.STOP
    return Verdict.CANDIDATE


def as_score(value: Any) -> float:
    """The return value of a metric as a number; if it is `Noted`, with its note.

    Raises:
        ScoreError: It is not a finite real number or a bool.
    """
    number = as_real(value)
    if math.isfinite(number):
        return value if isinstance(value, Noted) else number
    raise ScoreError(
        f"The metric returned {beginning(value, _SHOWN)} ({type(value).__name__}); it must return a finite "
        "number, a bool, or a prediction with such a `.score`."
    )
