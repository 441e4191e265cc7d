"""Why a request waits by our own will: for a cap per minute, or for an equal request that is under way."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

_WINDOW = 60.0
# NOTE: longest sleep between two looks, in seconds: what is given back early, or given up, is noticed
# that soon.
_LOOK = 0.2


@dataclass(eq=False)
class Ticket:
    """Leave for requests, or for all those of a program call: so much was taken at that time."""

    at: float
    requests: float
    tokens: float


class Pace:
    """Makes requests wait so that no sixty seconds hold more of them, or of their tokens, than allowed.

    How many tokens a request takes is known when it is answered: until then it counts with the mean
    of those before. None is no cap.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._caps = {"requests": requests or math.inf, "tokens": tokens or math.inf}
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: deque[Ticket] = deque()  # of the last minute, oldest first
        self._answered = self._used = 0

    def take(self, sleep: Callable[[float], object], requests: int = 1) -> Ticket:
        """Leave for so many requests, once they fit; ``sleep`` may raise to give up waiting."""
        while True:
            with self._lock:
                wanted = {"requests": requests, "tokens": requests * self._used / max(self._answered, 1)}
                delay = max(self._delay(what, amount) for what, amount in wanted.items())
                if delay <= 0:
                    return self._take(**wanted)
            sleep(min(delay, _LOOK))

    def settle(self, ticket: Ticket | None, tokens: int, requests: int | None = None) -> None:
        """What there was leave for is over, with that use of tokens in all, which count from now on.

        Args:
            ticket: The leave; None for a request that was sent without: it counts all the same.
            tokens: What was used.
            requests: How many were made, somewhere between `take` and now: they count from now on, the
                latest that any of them can have been sent. None for one, sent as soon as there was leave.
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
        """Seconds until ``amount`` more stays within the cap; more than the cap waits for an empty window."""
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
    """A request that others may be waiting for, sent by the thread ``owner``."""

    key: Hashable
    owner: int
    began: float
    is_given_up: Callable[[], bool]
    landed: threading.Event = field(default_factory=threading.Event)
    succeeded: bool = False


class Flights:
    """Has requests wait for an equal one under way, whose answer is then in the cache; never for good.

    A thread that has a request under way itself does not wait (so no two wait for each other), nor
    does anybody for a request that was given up or is older than ``patience`` seconds: it may hang.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight] = {}

    def join(
        self, key: Hashable, check: Callable[[], None], is_given_up: Callable[[], bool] = lambda: False
    ) -> Flight | None:
        """Waits for an equal request, if there is one.

        ``check`` is called while waiting, and may raise to end it; ``is_given_up`` says from any thread
        whether this request has been given up.

        Returns:
            The flight to `land` when the request has ended; one that has succeeded, where another
            request's answer is there; None where nobody is waited for.
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
        """The request has ended: an answer is in the cache, or the next in line sends it again."""
        with self._lock:
            del self._flights[flight.key]
            flight.succeeded = succeeded
        flight.landed.set()
