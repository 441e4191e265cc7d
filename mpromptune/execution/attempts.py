"""Attempts of a call: verdicts on errors, backoff, and what rate limits cost."""

from __future__ import annotations

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
    wait_random_exponential,
)

from mpromptune.execution.interrupts import SLICE, Stopped
from mpromptune.execution.throttle import Load, Throttle

T = TypeVar("T")


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


class Attempts:
    """Makes a call again where another attempt may succeed.

    Args:
        judge: The verdict on an exception.
        retry: How often and how patiently.
        retry_after: Seconds that an exception asks to wait.
        num_threads: Attempts in flight at once, unless calls are refused.
        stopped: Ends all waiting.
        admits: Whether another attempt may be made; where none may, none is waited for.

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
        waits = retry.max_wait, retry.give_up_after
        self._throttle = Throttle(num_threads, *waits, stopped, sleep=self._sleep)
        self.down: Exception | None = None

    @property
    def limit(self) -> int:
        """Attempts that may be in flight now; fewer than threads while calls are refused."""
        return self._throttle.limit

    @property
    def load(self) -> Load:
        """Attempts in flight now, and those that may be."""
        return self._throttle.load

    def __call__(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, or what its last attempt raised.

        Raises:
            Stopped: Nothing is to begin any more.
        """
        try:
            result: T = self._retrying()(self._unrefused, call)
        except Exception as error:
            if self._judge(error) in INFRASTRUCTURE:
                self.down = error
            raise
        self.down = None
        return result

    def _unrefused(self, call: Callable[[], T]) -> T:
        """An attempt that was not refused: those that are cost waiting, and count for nothing."""
        while True:
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

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._judge(e) is Verdict.RETRY),
            stop=self._give_up,
            wait=self._pause,
            sleep=self._sleep,
            reraise=True,
        )

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopped.wait(min(SLICE, left)):
            if not self._admits():
                raise Stopped

    def _give_up(self, state: RetryCallState) -> bool:
        return self._stopped.is_set() or stop_after_attempt(self._retry.attempts)(state)

    def _pause(self, state: RetryCallState) -> float:
        backoff = wait_random_exponential(max=self._retry.max_wait)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = (self._retry_after(error) if error else None) or 0.0
        return max(backoff, min(asked, self._retry.give_up_after))
