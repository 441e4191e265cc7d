"""Work items on any executor: attempts, timeouts, the verdict on errors, and cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
import numbers
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_random_exponential,
)

from mpromptune.daemons import in_daemon
from mpromptune.errors import CallTimeoutError, ScoreError
from mpromptune.interrupts import Stopped
from mpromptune.priority import Priority
from mpromptune.throttle import Throttle
from mpromptune.usage import Meter, Usage, current_meter, metered, record

logger = logging.getLogger(__name__)

Score = Callable[[dict[str, int], int], float]
Keep = Callable[["Outcome"], None]


class Verdict(Enum):
    """What an exception says about the example being scored."""

    RETRY = "infrastructure failed; the call says nothing about the candidate"
    THROTTLE = "the provider refused one call too many; it is made again, more slowly"
    CANDIDATE = "the candidate failed; the example counts with failure_score"
    STOP = "no further call can succeed"


INFRASTRUCTURE = frozenset({Verdict.RETRY, Verdict.THROTTLE})

# The same class from Python 3.11 on.
_TIMEOUTS = TimeoutError | futures.TimeoutError | asyncio.TimeoutError

Classify = Callable[[BaseException], Verdict]
RetryAfter = Callable[[BaseException], float | None]


def no_hint(error: BaseException) -> float | None:
    """The default reading of an error: it does not say how long to wait."""
    return None


def classify_builtin(error: BaseException) -> Verdict:
    """The default verdict: network and timeout errors are retried, a bad score stops the run."""
    if isinstance(error, ConnectionError | _TIMEOUTS):
        return Verdict.RETRY
    if isinstance(error, ScoreError):
        return Verdict.STOP
    return Verdict.CANDIDATE


@dataclass(frozen=True)
class RetryPolicy:
    """How long and how often one example is tried: exponential backoff with full jitter.

    Attributes:
        attempts: Calls made for one example before its trial fails; refused ones (rate limits) do
            not count.
        max_wait: Longest pause between two attempts, in seconds, that no provider asked for.
        timeout: Seconds after which an attempt is given up; None waits for ever.
        give_up_after: Seconds in which calls were refused and none succeeded, after which rate
            limits are taken for an outage; also the longest pause that a provider may ask for.
    """

    attempts: int = 6
    max_wait: float = 60.0
    timeout: float | None = None
    give_up_after: float = 3600.0


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
        self._score = score
        self._queue: Priority[Outcome] = Priority(executor, num_threads)
        self._classify = classify
        self._retry = retry or RetryPolicy()
        self._retry_after = retry_after
        self.stopped = stopped or threading.Event()
        self.fatal: Exception | None = None  # what has stopped them, if it was an error
        self._throttle = Throttle(num_threads, self._retry.max_wait, self._retry.give_up_after, self.stopped)
        self._admits = admits
        self._ended = itertools.count()

    @property
    def limit(self) -> int:
        """Attempts that may be in flight now; fewer than threads while calls are refused."""
        return self._throttle.limit

    def submit(
        self, params: Mapping[str, int], example: int, keep: Keep | None = None, idle: bool = False
    ) -> Future[Outcome]:
        """Queues one item; the future never raises what ``score`` raised.

        Args:
            params: The configuration.
            example: The example.
            keep: Called with the outcome, in the worker, before anybody else sees it.
            idle: Whether it is for a worker that has nothing else to do.
        """
        context = contextvars.copy_context()
        return self._queue.submit(partial(context.run, self._kept, keep, dict(params), example), idle)

    def verdict(self, outcome: Outcome) -> Verdict | None:
        """The verdict on a failed outcome; None for a scored or a skipped one."""
        return None if outcome.error is None else self._judge(outcome.error)

    def _judge(self, error: BaseException) -> Verdict:
        return Verdict.RETRY if isinstance(error, CallTimeoutError) else self._classify(error)

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
            score = self._retrying()(self._admitted, params, example)
        except Stopped:
            return Outcome(example)
        except Exception as error:  # noqa: BLE001 - whatever `score` raises is judged, never lost
            if self._judge(error) is Verdict.STOP:
                self.fatal = self.fatal or error
                self.stopped.set()
            return Outcome(example, error=error, order=next(self._ended))
        return Outcome(example, score=score, order=next(self._ended))

    def _admitted(self, params: dict[str, int], example: int) -> float:
        """An attempt that was not refused: those that are cost waiting, and count for nothing."""
        while True:
            ticket = self._throttle.enter()
            try:
                score = self._attempt(params, example)
            except Exception as error:
                throttled = self._judge(error) is Verdict.THROTTLE
                if not throttled or not self._throttle.refused(ticket, self._retry_after(error)):
                    raise
            else:
                self._throttle.succeeded()
                return score
            finally:
                self._throttle.leave()

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

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._judge(e) is Verdict.RETRY),
            stop=self._give_up,
            wait=self._pause,
            sleep=sleep_using_event(self.stopped),
            reraise=True,
        )

    def _give_up(self, state: RetryCallState) -> bool:
        return self.stopped.is_set() or stop_after_attempt(self._retry.attempts)(state)

    def _pause(self, state: RetryCallState) -> float:
        backoff = wait_random_exponential(max=self._retry.max_wait)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = (self._retry_after(error) if error else None) or 0.0
        return max(backoff, min(asked, self._retry.give_up_after))


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
    if getattr(value, "ndim", None) == 0:  # scalars of numpy and torch; np.bool_ is no Real
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ScoreError(
        f"The metric returned {value!r} ({type(value).__name__}); it must return a finite number, a "
        "bool, or a prediction with such a `.score`."
    )
