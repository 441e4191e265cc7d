"""Attempts of a call: verdicts on errors, backoff (by tenacity), and what rate limits cost.

The throttle is by hand: how many calls may be in flight depends on the answers to all of them.
"""

from __future__ import annotations

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

from mpromptune.execution.interrupts import SLICE, Stopped

T = TypeVar("T")

# NOTE: seconds between two looks at whether a slot is free; small against the seconds of an LM call,
# and only paid by threads that are held back.
_TICK = 0.05


class Verdict(Enum):
    """What an exception says about the example being scored."""

    RETRY = "infrastructure failed; the call says nothing about the candidate"
    THROTTLE = "the provider refused one call too many; it is made again, more slowly"
    CANDIDATE = "the candidate failed; the example counts with failure_score"
    REFUSED = "the prompt was refused; as CANDIDATE, unless others are refused on the same example"
    STOP = "no further call can succeed"


INFRASTRUCTURE = frozenset({Verdict.RETRY, Verdict.THROTTLE})
FAILURES = frozenset({Verdict.CANDIDATE, Verdict.REFUSED})


Classify = Callable[[BaseException], Verdict]
RetryAfter = Callable[[BaseException], float | None]


def no_hint(error: BaseException) -> float | None:
    """The default reading of an error: it does not say how long to wait."""
    return None


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
class Load:
    """How busy a pool is.

    Attributes:
        running: Calls in flight now.
        limit: Calls that may be; fewer than ``most`` while a provider refuses some.
        most: Workers.
        pause: Seconds until another call may begin, where a provider asked to be left alone.
    """

    running: int
    limit: int
    most: int
    pause: float = 0.0


class Throttle:
    """Additive increase, multiplicative decrease of the calls in flight (as in TCP, Jacobson 1988).

    A refusal halves the limit and begins a pause for all; the refusals of calls that were in flight
    at that moment say nothing new. Each success raises the limit by its reciprocal, so by one in a
    round trip, up to the whole pool. When something runs changes; what runs does not.
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
        self._streak = 0  # of them, since the last success
        self._until = -float("inf")  # when the pause ends
        self._since: float | None = None  # of refusals only

    @property
    def load(self) -> Load:
        """What is in flight now, and what may be."""
        return Load(self._running, int(self._limit), self._most, max(0.0, self._until - self._clock()))

    def enter(self) -> int:
        """Waits until a call may begin, which ends with `leave`; returns a ticket for `refused`."""
        while True:
            with self._lock:
                delay = self._until - self._clock()
                if delay <= 0 and self._running < int(self._limit):
                    self._running += 1
                    return self._decreases
            self._sleep(delay if delay > 0 else _TICK)

    def leave(self) -> None:
        """The call is over."""
        with self._lock:
            self._running -= 1

    def succeeded(self) -> None:
        """The call was answered."""
        with self._lock:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._streak, self._since = 0, None

    def refused(self, ticket: int, retry_after: float | None = None) -> bool:
        """The call was refused as one too many; whether another attempt makes sense."""
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
    """Makes a call again where another attempt may succeed, until ``stopped`` or no longer ``admits``.

    Attributes:
        down: What the last call failed with that was given up, until another one succeeds.
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
        """Attempts in flight now, and those that may be."""
        return self._throttle.load

    def __call__(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, or what its last attempt raised.

        Raises:
            Stopped: Nothing is to begin any more.
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
        """An attempt that was not refused: those that are cost waiting, and count for nothing."""
        while not self._stopped.is_set():
            ticket = self._throttle.enter()
            try:
                result = call()
            except Exception as error:
                throttled = self._judge(error) is Verdict.THROTTLE
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
