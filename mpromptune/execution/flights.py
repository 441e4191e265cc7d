"""Identical requests under way at the same time: one is sent, and the others find its answer in the cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

# NOTE: longest sleep between two looks at whether to give up waiting, in seconds.
_LOOK = 0.1


@dataclass
class Flight:
    """A request that others may be waiting for.

    Attributes:
        key: What makes requests equal.
        owner: The thread that sent it.
        began: When.
        is_given_up: Whether whoever sent it does not wait for it any more.
        landed: Set when it has ended.
        succeeded: Whether with an answer.
    """

    key: Hashable
    owner: int
    began: float
    is_given_up: Callable[[], bool]
    landed: threading.Event = field(default_factory=threading.Event)
    succeeded: bool = False


class Flights:
    """Has requests wait for an equal one that is under way, but never for good.

    A thread that has a request under way itself does not wait (so no two wait for each other), nor
    does anybody for a request that was given up or is older than ``patience`` seconds: it may hang.

    Args:
        patience: Age of a request that nobody waits for.
        clock: Says the time, in seconds.
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

        Args:
            key: What makes requests equal.
            check: Called while waiting; may raise to end it.
            is_given_up: Says from any thread whether this request has been given up.

        Returns:
            The flight to `land` when the request has ended; one that has succeeded, where another
            request's answer is there; None where nobody is waited for.
        """
        me = threading.get_ident()
        while True:
            with self._lock:
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = Flight(key, me, self._clock(), is_given_up)
                    return flight
                if any(other.owner == me for other in self._flights.values()):
                    return None
            if not self._wait(flight, check):
                return None
            if flight.succeeded:
                return flight

    def _wait(self, flight: Flight, check: Callable[[], None]) -> bool:
        """Whether the request ended while it was worth waiting for."""
        while not flight.landed.wait(_LOOK):
            check()
            if flight.is_given_up() or self._clock() - flight.began > self._patience:
                return False
        return True

    def land(self, flight: Flight, succeeded: bool) -> None:
        """The request has ended: an answer is in the cache, or the next in line sends it again."""
        with self._lock:
            del self._flights[flight.key]
            flight.succeeded = succeeded
        flight.landed.set()
