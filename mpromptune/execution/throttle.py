"""Adaptive concurrency: how many calls may be in flight at a provider that refuses some of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpromptune.execution.interrupts import Stopped

# NOTE: seconds between two looks at whether a slot is free; small against the seconds of an LM call,
# and only paid by threads that are held back.
_TICK = 0.05


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

    Args:
        most: Calls in flight without refusals.
        max_wait: Longest pause, in seconds, that is not the provider's own wish.
        give_up_after: Seconds of refusals without one success after which there is no hope.
        stopped: Ends all waiting.
        clock: Says the time, in seconds.
        sleep: Waits for so many seconds, or until ``stopped`` is set.
    """

    def __init__(
        self,
        most: int,
        max_wait: float = 60.0,
        give_up_after: float = 3600.0,
        stopped: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._most = most
        self._max_wait = max_wait
        self._give_up_after = give_up_after
        self._stopped = stopped or threading.Event()
        self._clock = clock
        self._sleep = sleep or self._stopped.wait
        self._lock = threading.Lock()
        self._jitter = random.Random()  # decides when a call is made, never which
        self._limit = float(most)
        self._running = 0
        self._decreases = 0
        self._streak = 0  # of them, since the last success
        self._until = -float("inf")  # when the pause ends
        self._since: float | None = None  # of refusals only

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        return int(self._limit)

    @property
    def load(self) -> Load:
        """What is in flight now, and what may be."""
        pause = max(0.0, self._until - self._clock())
        return Load(self._running, self.limit, self._most, pause)

    def enter(self) -> int:
        """Waits until a call may begin, which ends with `leave`.

        Returns:
            A ticket for `refused`.

        Raises:
            Stopped: Nothing is to begin any more.
        """
        while not self._stopped.is_set():
            with self._lock:
                delay = self._delay()
                if not delay:
                    self._running += 1
                    return self._decreases
            self._sleep(delay)
        raise Stopped

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
        """The call was refused as one too many.

        Args:
            ticket: What `enter` returned.
            retry_after: Seconds that the provider wants to be left alone.

        Returns:
            Whether another attempt makes sense.
        """
        with self._lock:
            now = self._clock()
            self._since = now if self._since is None else self._since
            if max(now - self._since, retry_after or 0.0) >= self._give_up_after:
                return False
            if ticket == self._decreases:
                self._limit = max(1.0, self._limit / 2)
                self._decreases += 1
                self._streak += 1
                self._pause(now, self._backoff() if retry_after is None else retry_after)
            elif retry_after is not None:
                self._pause(now, retry_after)
            return True

    def _pause(self, now: float, seconds: float) -> None:
        self._until = max(self._until, now + seconds)

    def _backoff(self) -> float:
        return self._jitter.uniform(0, min(self._max_wait, 2.0 ** min(self._streak, 32)))

    def _delay(self) -> float:
        """Seconds until it is worth asking again; 0 for a call that may begin."""
        pause = self._until - self._clock()
        if pause > 0:
            return pause
        return _TICK if self._running >= self.limit else 0.0
