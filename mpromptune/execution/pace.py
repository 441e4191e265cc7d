"""Caps on requests and tokens per minute, kept in every window of sixty seconds."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_WINDOW = 60.0
# NOTE: longest sleep between two looks, in seconds: what is given back early is noticed that soon.
_LOOK = 0.25


@dataclass
class _Entry:
    """So much was taken at that time."""

    at: float
    amount: float


@dataclass
class _Window:
    """What was taken within the last minute."""

    cap: float
    entries: deque[_Entry] = field(default_factory=deque)
    total: float = 0.0

    def delay(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` more stays within the cap; more than the cap waits for an empty window."""
        while self.entries and self.entries[0].at <= now - _WINDOW:
            self.total -= self.entries.popleft().amount
        excess = self.total + min(amount, self.cap) - self.cap
        for entry in self.entries:
            if excess <= 0:
                break
            excess -= entry.amount
            if excess <= 0:
                return entry.at + _WINDOW - now
        return 0.0

    def take(self, amount: float, now: float) -> _Entry:
        self.entries.append(_Entry(now, amount))
        self.total += amount
        return self.entries[-1]

    def correct(self, entry: _Entry, amount: float, now: float) -> None:
        """What was really used, which counts from now on."""
        if entry.at > now - _WINDOW and entry in self.entries:
            self.entries.remove(entry)
            self.total -= entry.amount
        if amount:
            self.take(amount, now)


@dataclass(frozen=True)
class Ticket:
    """Leave for one request, or for all of a program call."""

    request: _Entry
    tokens: _Entry


class Pace:
    """Makes requests wait so that no minute holds more of them, or of their tokens, than allowed.

    How many tokens a request takes is known when it is answered: until then it counts with the mean
    of those before.

    Args:
        requests: Requests per minute; None for no cap.
        tokens: Tokens per minute; None for no cap.
        clock: Says the time, in seconds.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = _Window(float("inf") if requests is None else requests)
        self._tokens = _Window(float("inf") if tokens is None else tokens)
        self._clock = clock
        self._lock = threading.Lock()
        self._answered = 0
        self._used = 0

    def take(self, sleep: Callable[[float], object], requests: int = 1) -> Ticket:
        """Leave for so many requests, once they fit; ``sleep`` may raise to give up waiting."""
        while True:
            with self._lock:
                now, expected = self._clock(), requests * self._used / max(self._answered, 1)
                delay = max(self._requests.delay(requests, now), self._tokens.delay(expected, now))
                if delay <= 0:
                    return Ticket(self._requests.take(requests, now), self._tokens.take(expected, now))
            sleep(min(delay, _LOOK))

    def owe(self) -> Ticket:
        """For a request that was sent without leave: it counts all the same."""
        with self._lock:
            now = self._clock()
            return Ticket(self._requests.take(1, now), self._tokens.take(0, now))

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """The request was answered with that use of tokens."""
        with self._lock:
            self._note(ticket, tokens, 1)

    def settle_all(self, ticket: Ticket, tokens: int, requests: int) -> None:
        """So many requests were made somewhere between `take` and now, with that use of tokens in all.

        They count from now on, the latest that any of them can have been sent.
        """
        with self._lock:
            self._requests.correct(ticket.request, requests, self._clock())
            self._note(ticket, tokens, requests)

    def _note(self, ticket: Ticket, tokens: int, requests: int) -> None:
        self._answered += requests
        self._used += tokens
        self._tokens.correct(ticket.tokens, tokens, self._clock())

    def refund(self, ticket: Ticket) -> None:
        """No request was sent after all: a cache answered."""
        with self._lock:
            self._requests.correct(ticket.request, 0, self._clock())
            self._tokens.correct(ticket.tokens, 0, self._clock())
