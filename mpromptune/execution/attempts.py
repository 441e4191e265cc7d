"""Attempts of a call: verdicts on errors, backoff (by tenacity), and a throttle for rate limits.

The throttle is own code because no library adapts the number of calls in flight to the answers to all calls.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)

from mpromptune.errors import reason
from mpromptune.execution.interrupts import SLICE, Stopped

logger = logging.getLogger(__name__)

T = TypeVar("T")

# NOTE: seconds between two checks for a free slot: short compared with an LM call, and only for threads
# that the throttle holds back.
_TICK = 0.05
# NOTE: failures in succession that are worth a line: single failures are usual, and end with the next answer.
_SEVERAL = 3


class Verdict(Enum):
    """What an exception says about the example being scored."""

    RETRY = "the infrastructure failed; this says nothing about the candidate"
    THROTTLE = "the provider refused the call by a rate limit; it is repeated, more slowly"
    CANDIDATE = "the candidate failed; the example counts with failure_score"
    REFUSED = "the prompt was refused; like CANDIDATE, unless others are refused on the same example"
    STOP = "no further call can succeed"


INFRASTRUCTURE = frozenset({Verdict.RETRY, Verdict.THROTTLE})
FAILURES = frozenset({Verdict.CANDIDATE, Verdict.REFUSED})


Classify = Callable[[BaseException], Verdict]
RetryAfter = Callable[[BaseException], float | None]


def no_hint(error: BaseException) -> float | None:
    """The default: no error says how long to wait."""
    return None


@dataclass(frozen=True)
class RetryPolicy:
    """Number, pauses and timeout of the attempts of a call: exponential backoff with full jitter.

    Attributes:
        attempts: Attempts for one example before its trial fails, not counting rate limits.
        max_wait: Longest pause between two attempts in seconds, unless a provider asks for more.
        timeout: Seconds after which an attempt is cancelled; None waits without limit.
        give_up_after: Seconds of refused calls without a success after which rate limits count as an
            outage; also the longest pause that a provider may ask for.
    """

    attempts: int = 6
    max_wait: float = 60.0
    timeout: float | None = None
    give_up_after: float = 3600.0


@dataclass(frozen=True)
class Load:
    """The load of a pool.

    Attributes:
        running: Calls in flight now.
        limit: Most calls in flight now; fewer than ``most`` while a provider refuses calls.
        most: Number of workers.
        pause: Seconds until another call may begin, if a provider asked for a pause.
        failed: Calls that failed because of the infrastructure since the last answer.
    """

    running: int
    limit: int
    most: int
    pause: float = 0.0
    failed: int = 0


class Throttle:
    """Additive increase, multiplicative decrease of the calls in flight (as in TCP, Jacobson 1988).

    A refusal halves the limit and starts a pause for all calls; further refusals of calls that were already
    in flight do not halve it again. Each success raises the limit by its reciprocal, so by one per round
    trip, up to the whole pool. The throttle changes when calls are made, not which.
    """

    def __init__(
        self,
        most: int,
        retry: RetryPolicy,
        sleep: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._retry = retry
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._limit = float(most)
        self._running = 0
        self._decreases = 0
        self._failed = 0  # failures since the last success
        self._streak = 0  # decreases since the last success
        self._until = -float("inf")  # end of the pause
        self._since: float | None = None  # time of the first refusal since the last success

    @property
    def load(self) -> Load:
        """The calls in flight now, and their limit."""
        pause = max(0.0, self._until - self._clock())
        return Load(self._running, int(self._limit), self._most, pause, self._failed)

    def enter(self) -> int:
        """Wait until a call may begin; `leave` ends it. Return a ticket for `refused`."""
        while True:
            with self._lock:
                delay = self._until - self._clock()
                if delay <= 0 and self._running < int(self._limit):
                    self._running += 1
                    return self._decreases
            self._sleep(delay if delay > 0 else _TICK)

    def leave(self) -> None:
        """Note that a call has ended."""
        with self._lock:
            self._running -= 1

    def succeeded(self) -> None:
        """Note that a call was answered."""
        with self._lock:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._streak, self._failed, self._since = 0, 0, None

    def failed(self, error: BaseException) -> None:
        """Note that the infrastructure failed; the reason is logged once until a call is answered."""
        with self._lock:
            self._failed += 1
            is_news = self._failed == _SEVERAL
        if is_news:
            logger.warning(
                "The last %d calls failed because of the infrastructure, and calls are tried again, at most "
                "%d times each. The reason: %s.",
                *(_SEVERAL, self._retry.attempts, reason(error)),
            )

    def refused(self, ticket: int, retry_after: float | None = None) -> bool:
        """Note that a call was refused by a rate limit; return whether to try again."""
        with self._lock:
            now = self._clock()
            self._since = now if self._since is None else self._since
            if max(now - self._since, retry_after or 0.0) >= self._retry.give_up_after:
                return False
            pause = retry_after or 0.0
            if ticket == self._decreases:
                self._limit = max(1.0, self._limit / 2)
                self._decreases += 1
                self._streak += 1
                if retry_after is None:
                    pause = random.uniform(0, min(self._retry.max_wait, 2.0 ** min(self._streak, 32)))
            self._until = max(self._until, now + pause)
            return True


class Attempts:
    """Repeats a call while another attempt may succeed, until ``stopped`` is set or ``admits()`` is false.

    Attributes:
        down: Infrastructure error of the last call whose attempts all failed; None after a success.
    """

    def __init__(
        self,
        judge: Classify,
        retry: RetryPolicy,
        retry_after: RetryAfter,
        num_threads: int,
        stopped: threading.Event,
        admits: Callable[[], bool] = lambda: True,
    ) -> None:
        self._judge = judge
        self._retry = retry
        self._retry_after = retry_after
        self._stopped = stopped
        self._admits = admits
        self._throttle = Throttle(num_threads, retry, self._sleep)
        self.down: Exception | None = None

    @property
    def load(self) -> Load:
        """The attempts in flight now, and their limit."""
        return self._throttle.load

    def __call__(self, call: Callable[[], T]) -> T:
        """The result of ``call``; if all attempts fail, the error of the last one is raised.

        Raises:
            Stopped: No further attempt may begin.
        """
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._judge(e) is Verdict.RETRY),
            stop=stop_after_attempt(self._retry.attempts) | stop_when_event_set(self._stopped),
            wait=self._pause,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            result: T = retrying(self._unrefused, call)
        except Exception as error:
            if self._judge(error) in INFRASTRUCTURE:
                self.down = error
            raise
        self.down = None
        return result

    def _unrefused(self, call: Callable[[], T]) -> T:
        """The result of one attempt; it is repeated after rate limits, which do not count as attempts."""
        while not self._stopped.is_set():
            ticket = self._throttle.enter()
            try:
                if not self._admits():
                    raise Stopped
                result = call()
            except Exception as error:
                verdict = self._judge(error)
                if verdict is Verdict.RETRY and not self._stopped.is_set():
                    self._throttle.failed(error)
                throttled = verdict is Verdict.THROTTLE
                if not throttled or not self._throttle.refused(ticket, self._retry_after(error)):
                    raise
            else:
                self._throttle.succeeded()
                return result
            finally:
                self._throttle.leave()
        raise Stopped

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._stopped.wait(min(SLICE, left)) or not self._admits():
                raise Stopped

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = (self._retry_after(error) if error else None) or 0.0
        backoff = wait_random_exponential(max=self._retry.max_wait)(state)
        return max(backoff, min(asked, self._retry.give_up_after))
