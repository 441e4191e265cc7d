"""Work items on any executor: scores, timeouts, and cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mpromptune.errors import (
    CallTimeoutError,
    ExecutorBrokenError,
    ScoreError,
    TravelError,
    WorkerLostError,
    as_real,
)
from mpromptune.execution.attempts import Attempts, Classify, RetryAfter, RetryPolicy, Verdict, no_hint
from mpromptune.execution.daemons import in_daemon
from mpromptune.execution.interrupts import Stopped, contained
from mpromptune.execution.throttle import Load
from mpromptune.execution.usage import Meter, Usage, current_meter, metered, record

logger = logging.getLogger(__name__)

Score = Callable[[dict[str, int], int], float]
Keep = Callable[["Outcome"], None]


# The same class from Python 3.11 on.
_TIMEOUTS = TimeoutError | futures.TimeoutError | asyncio.TimeoutError


def classify_builtin(error: BaseException) -> Verdict:
    """The default verdict: network and timeout errors are retried, a bad score stops the run."""
    if isinstance(error, ConnectionError | _TIMEOUTS):
        return Verdict.RETRY
    if isinstance(error, ScoreError):
        return Verdict.STOP
    return Verdict.CANDIDATE


@dataclass(frozen=True)
class Outcome:
    """What became of one work item: a score, an error, or nothing when the run was stopped.

    Attributes:
        example: The example.
        score: Its score.
        error: What the last attempt raised.
        order: The how-manieth item this was to come to an end; -1 for one known before the run.
        usage: What all attempts used.
    """

    example: int
    score: float | None = None
    error: BaseException | None = None
    order: int = -1
    usage: Usage = field(default_factory=Usage)


def outcome_of(example: int, future: Future[Outcome]) -> Outcome:
    """What a call has answered; nothing where it hangs."""
    return future.result() if future.done() else Outcome(example)


def is_cut_short(outcomes: Iterable[Outcome]) -> bool:
    """Whether calls were not made: all that is lacking then may still be measured by another run."""
    return any(outcome.score is None and outcome.error is None for outcome in outcomes)


def scores_of(calls: Iterable[Future[Outcome]]) -> dict[int, float]:
    """Example to score, of the calls that are done."""
    done = [f.result() for f in calls if f.done() and not f.cancelled() and not f.exception()]
    return {outcome.example: outcome.score for outcome in done if outcome.score is not None}


# What ends the attempt that runs in this context.
_STOPS: contextvars.ContextVar[tuple[threading.Event, ...]] = contextvars.ContextVar(
    "mpromptune_stops", default=()
)


@contextmanager
def stoppable(*events: threading.Event) -> Iterator[None]:
    """What runs in this context is to begin nothing more once any of these events is set."""
    token = _STOPS.set((*_STOPS.get(), *events))
    try:
        yield
    finally:
        _STOPS.reset(token)


def current_stop() -> Callable[[], bool]:
    """Says, now and from any thread later on, whether nobody waits any more for what runs here.

    That is so once the run has stopped, and for an attempt that was given up after its timeout. Both
    go on in their threads, which nothing can end from outside: whatever is about to spend something,
    an LM call above all, asks first, or calls `check_stopped`.
    """
    events = _STOPS.get()
    return lambda: any(event.is_set() for event in events)


def check_stopped() -> None:
    """Ends a chain of calls that nobody waits for any more.

    Raises:
        Stopped: As `current_stop` says.
    """
    if current_stop()():
        raise Stopped


class Workers:
    """Scores (configuration, example) pairs on an executor.

    Every item runs in a copy of the caller's context, so that context variables (DSPy's settings
    among them) reach it, and checks the stop event before it spends anything.

    Args:
        score: ``score(params, example) -> float``.
        executor: Any ``concurrent.futures.Executor`` of this process.
        classify: The verdict on an exception of ``score``.
        retry: How often and how patiently infrastructure errors are retried.
        retry_after: Seconds that an exception of ``score`` asks to wait.
        num_threads: Attempts in flight at once, unless calls are refused.
        stopped: Set when nothing more may begin.
        admits: Whether another attempt may be made, asked before each.
    """

    def __init__(
        self,
        score: Score,
        executor: Executor,
        classify: Classify = classify_builtin,
        retry: RetryPolicy | None = None,
        retry_after: RetryAfter = no_hint,
        num_threads: int = 8,
        admits: Callable[[], bool] = lambda: True,
        stopped: threading.Event | None = None,
    ) -> None:
        self._score = partial(contained, score)
        self._executor = executor
        self._classify = classify
        self._retry = retry or RetryPolicy()
        self.stopped = stopped or threading.Event()
        self.fatal: Exception | None = None  # what has stopped them, if it was an error
        self._admits = admits
        judged = self._judge, self._retry, retry_after
        self._attempts = Attempts(*judged, num_threads, self.stopped, admits)
        self._ended = itertools.count()

    @property
    def limit(self) -> int:
        """Attempts that may be in flight now; fewer than threads while calls are refused."""
        return self._attempts.limit

    @property
    def load(self) -> Load:
        """Attempts in flight now, and those that may be."""
        return self._attempts.load

    def submit(self, params: Mapping[str, int], example: int, keep: Keep | None = None) -> Future[Outcome]:
        """Queues one item; the future never raises what ``score`` raised.

        Args:
            params: The configuration.
            example: The example.
            keep: Called with the outcome, in the worker, before anybody else sees it.
        """
        context = contextvars.copy_context()
        return self._executor.submit(context.run, self._kept, keep, dict(params), example)

    def verdict(self, outcome: Outcome) -> Verdict | None:
        """The verdict on a failed outcome; None for a scored or a skipped one."""
        return None if outcome.error is None else self._judge(outcome.error)

    def _judge(self, error: BaseException) -> Verdict:
        if isinstance(error, CallTimeoutError | WorkerLostError):
            return Verdict.RETRY
        if isinstance(error, ExecutorBrokenError | TravelError):
            return Verdict.STOP
        return self._classify(error)

    def _kept(self, keep: Keep | None, params: dict[str, int], example: int) -> Outcome:
        outcome = self._measure(params, example)
        if keep is not None:
            keep(outcome)
        return outcome

    def _measure(self, params: dict[str, int], example: int) -> Outcome:
        began = time.monotonic()
        with metered() as meter:
            outcome = self._outcome(params, example)
            if meter.total.program_calls:
                record(Usage(seconds=time.monotonic() - began))
        return replace(outcome, usage=meter.total)

    def _outcome(self, params: dict[str, int], example: int) -> Outcome:
        try:
            score = self._attempts(partial(self._attempt, params, example))
        except Stopped:
            return Outcome(example)
        except Exception as error:  # noqa: BLE001 - whatever `score` raises is judged, never lost
            if self._judge(error) is Verdict.STOP:
                self.fatal = self.fatal or error
                self.stopped.set()
            return Outcome(example, error=error, order=next(self._ended))
        return Outcome(example, score=score, order=next(self._ended))

    def _attempt(self, params: dict[str, int], example: int) -> float:
        if not self._admits():
            raise Stopped
        record(Usage(program_calls=1))
        timeout, given_up = self._retry.timeout, threading.Event()
        with stoppable(self.stopped, given_up):
            if timeout is None:
                return as_score(self._score(params, example))
            call = partial(contextvars.copy_context().run, self._score, params, example)
            future = in_daemon(call)
        if _is_done_within(timeout, future):
            return as_score(future.result())
        given_up.set()
        logger.warning(
            "Example %d with %s gave no answer within %g s. What that attempt uses is paid for; of %d "
            "attempts in all, those that are left are paid for again.",
            *(example, params, timeout, self._retry.attempts),
        )
        raise CallTimeoutError(f"no answer within {timeout:g} s")


def _is_done_within(timeout: float, future: Future[float]) -> bool:
    """Whether it is; what it waits by our own will (caps, equal requests) is not held against it."""
    meter, began = current_meter() or Meter(), time.monotonic()
    before = meter.waited
    while not future.done():
        left = timeout + (meter.waited - before) - (time.monotonic() - began)
        if left <= 0:
            return False
        wait([future], left)
    return True


def as_score(value: Any) -> float:
    """A metric's return value as a number.

    Raises:
        ScoreError: It is not one finite real number (or bool).
    """
    number = as_real(value)
    if math.isfinite(number):
        return number
    raise ScoreError(
        f"The metric returned {value!r} ({type(value).__name__}); it must return a finite number, a "
        "bool, or a prediction with such a `.score`."
    )
