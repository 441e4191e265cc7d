"""Requests that wait on purpose: for a limit per minute, or for an equal request in flight."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

_WINDOW = 60.0
# NOTE: longest sleep between two checks, in seconds, after which a change is noticed.
_LOOK = 0.2


@dataclass(eq=False)
class Ticket:
    """Permission for requests, or for all requests of a program call, and the time when it was given."""

    at: float
    requests: float
    tokens: float


class Pace:
    """Makes requests wait so that no 60 seconds contain more requests, or tokens, than allowed.

    The tokens of a request are known when it is answered; until then it counts with the mean of earlier
    requests. None means no limit.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._caps = {"requests": requests or math.inf, "tokens": tokens or math.inf}
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: deque[Ticket] = deque()  # tickets of the last minute, oldest first
        self._answered = self._used = 0

    def take(self, sleep: Callable[[float], object], requests: int = 1) -> Ticket:
        """Wait until ``requests`` requests are allowed; ``sleep`` may raise an error to end the waiting."""
        while True:
            with self._lock:
                wanted = {"requests": requests, "tokens": requests * self._used / max(self._answered, 1)}
                delay = max(self._delay(what, amount) for what, amount in wanted.items())
                if delay <= 0:
                    return self._take(**wanted)
            sleep(min(delay, _LOOK))

    def settle(self, ticket: Ticket | None, tokens: int, requests: int | None = None) -> None:
        """Note that the requests of a ticket have ended; their tokens count from now on.

        Args:
            ticket: The ticket; None for a request that was sent without one, which counts too.
            tokens: Tokens used by all its requests.
            requests: Number of requests made between `take` and now. They count from now on, the latest
                time at which they can have been sent. None means one, sent when the ticket was given.
        """
        with self._lock:
            ticket = ticket or self._take(requests=1, tokens=0)
            ticket.tokens = 0
            if requests is not None:
                ticket.requests = 0
            self._take(requests or 0, tokens)
            self._answered += 1 if requests is None else requests
            self._used += tokens

    def _take(self, requests: float, tokens: float) -> Ticket:
        self._taken.append(Ticket(self._clock(), requests, tokens))
        return self._taken[-1]

    def _delay(self, what: str, amount: float) -> float:
        """Seconds until ``amount`` more is allowed; an amount above the limit waits for an empty window."""
        now, cap = self._clock(), self._caps[what]
        while self._taken and self._taken[0].at <= now - _WINDOW:
            self._taken.popleft()
        excess = sum(getattr(ticket, what) for ticket in self._taken) + min(amount, cap) - cap
        delay = 0.0
        for ticket in self._taken:
            if excess <= 0:
                break
            excess -= getattr(ticket, what)
            delay = ticket.at + _WINDOW - now
        return delay


@dataclass(eq=False)
class Flight:
    """A request in flight, sent by the thread ``owner``, for which equal requests may wait."""

    key: Hashable
    owner: int
    began: float
    is_given_up: Callable[[], bool]
    landed: threading.Event = field(default_factory=threading.Event)
    succeeded: bool = False


class Flights:
    """Makes requests wait for an equal request in flight, whose answer is then in the cache.

    A thread that has a request in flight does not wait, so that no two threads wait for each other. No thread
    waits for a request that was cancelled or is older than ``patience`` seconds, because it may hang.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight] = {}

    def join(
        self, key: Hashable, check: Callable[[], None], is_given_up: Callable[[], bool] = lambda: False
    ) -> Flight | None:
        """Wait for an equal request, if there is one.

        ``check`` is called while waiting, and may raise an error to end it; ``is_given_up`` returns, from any
        thread, whether this request was cancelled.

        Returns:
            A new flight, to `land` when the request has ended; or the flight of an equal request that has
            succeeded; or None if this thread does not wait.
        """
        me = threading.get_ident()
        while True:
            with self._lock:
                flight = self._flights.get(key)
                if flight is None:
                    return self._flights.setdefault(key, Flight(key, me, self._clock(), is_given_up))
                if any(other.owner == me for other in self._flights.values()):
                    return None
            while not flight.landed.wait(_LOOK):
                check()
                if flight.is_given_up() or self._clock() - flight.began > self._patience:
                    return None
            if flight.succeeded:
                return flight

    def land(self, flight: Flight, succeeded: bool) -> None:
        """End a flight: its answer is in the cache, or a waiting thread sends the request again."""
        with self._lock:
            del self._flights[flight.key]
            flight.succeeded = succeeded
        flight.landed.set()
