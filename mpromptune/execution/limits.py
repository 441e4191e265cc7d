"""Limits on what a search may use besides program calls: tokens, money and time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpromptune.errors import SearchStoppedError, require_count, require_positive
from mpromptune.execution.interrupts import GRACE, Stopped, stoppable
from mpromptune.execution.usage import Meter, StepUsage, Usage, current_meter

logger = logging.getLogger(__name__)

SEARCH = "search"  # the step in which trials are measured


@dataclass(frozen=True)
class Limits:
    """What may be used at most; None means no limit.

    Attributes:
        max_tokens: Tokens in both directions, cache hits apart.
        max_cost: US dollars.
        max_seconds: Wall-clock time.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            require_count("max_tokens", self.max_tokens)
        for name in ("max_cost", "max_seconds"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))


# NOTE: a call that takes this many times as long as the mean call is taken for one that hangs; answers
# of the same LM to the same program seldom differ by more than their lengths do.
_MEAN_CALLS = 10

# What of a usage each limit is about; time is read from a clock.
MEASURE: dict[str, Callable[[Usage], float]] = {
    "max_tokens": lambda usage: usage.tokens,
    "max_cost": lambda usage: usage.cost,
    "max_seconds": lambda usage: 0.0,
}


def patience(usage: Usage, calls: int, least: float, most: float) -> float:
    """Seconds to wait for calls under way when no other may begin: what ten calls take on the average.

    That is known from the ``usage`` of so many ``calls``, and kept between ``least`` and ``most``.
    """
    return min(most, max(least, _MEAN_CALLS * usage.seconds / calls)) if calls else most


class Budget:
    """Limits that have begun to count, and the meters of the steps that they cover.

    Attributes:
        limits: What may be used.
        reached: The limit that is used up, once nothing more may be begun for it.
        patience: Seconds that calls under way are left once tokens or money are used up; until it is set,
            as many as once the time is (``grace``).
        meter: Counts what all steps use.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        grace: float = GRACE,
    ) -> None:
        self.limits = limits or Limits()
        self.patience = self._grace = grace
        self.reached: str | None = None
        self.meter = Meter(current_meter())  # a part of what is counted around it
        self._steps: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._has_seen_a_call = False
        self._clock = clock
        self._began = self._search_began = clock()
        self._deadline = self._began + (self.limits.max_seconds or math.inf)
        self._waited_since: float | None = None  # for what was under way when a limit was used up

    def step(self, name: str) -> Meter:
        """The meter of a step, which counts for the whole too."""
        with self._lock:
            return self._steps.setdefault(name, Meter(self.meter))

    def begin_search(self) -> Meter:
        """The meter of the search, whose calls per second count from now on."""
        self._search_began = self._clock()
        return self.step(SEARCH)

    @property
    def usage(self) -> StepUsage:
        """Everything used so far, by step."""
        return StepUsage({name: meter.total for name, meter in self._steps.items()})

    def admits(self) -> bool:
        """Whether anything more may be begun; once it may not, `reached` says why."""
        self.reached = self.reached or self._used_up()
        return self.reached is None

    @property
    def is_late(self) -> bool:
        """Whether ``max_seconds`` have passed; calls under way may still have their ``grace``."""
        return self._clock() >= self._deadline

    def is_over(self) -> bool:
        """Whether calls under way are not waited for any longer: a limit was used up some time ago."""
        name = self.reached or self._used_up()
        if name is None:
            return False
        now = self._clock()
        self._waited_since = now if self._waited_since is None else self._waited_since
        if now < min(self._deadline + self._grace, self._waited_since + self.patience):
            return False
        self.reached = self.reached or name
        return True

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Nothing in this context waits for what hangs once this `is_over`.

        Raises:
            SearchStoppedError: A limit was used up where there is nothing to return.
        """
        if self.limits == Limits():
            yield
            return
        try:
            with stoppable(self.is_over):
                yield
        except Stopped as stop:
            if self.reached is None:
                raise
            raise self.used_up("before the search began") from stop

    def used_up(self, when: str) -> SearchStoppedError:
        """The error that says which limit was reached."""
        limit = getattr(self.limits, self.reached or "", None)
        return SearchStoppedError(f"{self.reached}={limit} was used up {when}, by {self.usage.total}.")

    @property
    def overspent(self) -> float:
        """By how much the limit that was reached is exceeded, in its own unit."""
        return max(0.0, -self._left(self.meter.total).get(self.reached or "", 0.0))

    def calls_left(self, told: Usage, calls: int) -> tuple[str, int] | None:
        """How many program calls can still be paid, and the limit that says so; None if none does.

        The next calls are taken to use what the ``calls`` of the trials ``told`` so far have used, on the
        average: that is the same whatever the threads do. Of time, it is what the clock says.
        """
        before = sum((usage for name, usage in self.usage.items() if name != SEARCH), Usage())
        found: dict[str, int] = {}
        for name, left in self._left(before + told).items():
            took = MEASURE[name](told) if name != "max_seconds" else self._clock() - self._search_began
            if calls and took > 0:
                found[name] = max(0, math.floor(left * calls / took))
        return min(found.items(), key=lambda item: item[1]) if found else None

    def starts_unseen(self, used: Usage) -> bool:
        """Whether this call is the first of all, and nothing was counted that it has used."""
        with self._lock:
            is_first, self._has_seen_a_call = not self._has_seen_a_call, True
        return is_first and not (used.lm_calls or used.cache_hits or used.tokens or used.cost)

    def note_trial(self, used: Usage) -> None:
        """Warns, once, where limits cannot hold because scores do not say what they use."""
        limited = self.limits.max_tokens is not None or self.limits.max_cost is not None
        if limited and used.program_calls and self.starts_unseen(used):
            logger.warning(
                "A trial was measured, and `score` has recorded no usage: max_tokens and max_cost do not "
                "hold. Call mpromptune.execution.usage.record in `score`, in its thread or in a copy of "
                "its context."
            )

    def _used_up(self) -> str | None:
        return next((name for name, left in self._left(self.meter.total).items() if left <= 0), None)

    def _left(self, usage: Usage) -> dict[str, float]:
        """What is left of every limit given, in its unit."""
        used = {name: measure(usage) for name, measure in MEASURE.items()}
        used["max_seconds"] = self._clock() - self._began
        limits = {name: getattr(self.limits, name) for name in MEASURE}
        return {name: limit - used[name] for name, limit in limits.items() if limit is not None}
