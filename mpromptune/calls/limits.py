"""Limits on what a search may use besides program calls: tokens, money and time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from mpromptune.calls.usage import Meter, StepUsage, Usage, current_meter
from mpromptune.errors import require_count, require_positive

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


LIMIT_NAMES = tuple(field.name for field in fields(Limits))

# What of a usage each limit is about; time is read from a clock.
MEASURE: dict[str, Callable[[Usage], float]] = {
    "max_tokens": lambda usage: usage.tokens,
    "max_cost": lambda usage: usage.cost,
    "max_seconds": lambda usage: 0.0,
}


class Budget:
    """Limits that have begun to count, and the meters of the steps that they cover.

    Args:
        limits: What may be used.
        clock: Says the time, in seconds.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        self.reached: str | None = None
        self.meter = Meter(current_meter())  # a part of what is counted around it
        self._steps: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._noted = False
        self._clock = clock
        self._began = self._search_began = clock()

    def step(self, name: str) -> Meter:
        """The meter of a step, which counts for the whole too."""
        with self._lock:
            return self._steps.setdefault(name, Meter(self.meter))

    @property
    def usage(self) -> StepUsage:
        """Everything used so far, by step."""
        return StepUsage({name: meter.total for name, meter in self._steps.items()})

    def admits(self) -> bool:
        """Whether anything more may be begun; once it may not, `reached` says why."""
        if self.reached is None:
            used = self._rows(self.meter.total)
            self.reached = next((name for name, limit, amount in used if amount >= limit), None)
        return self.reached is None

    def is_unseen(self, used: Usage) -> bool:
        """Whether the first program call of all has used nothing that was counted; False for all others."""
        with self._lock:
            first, self._noted = not self._noted, True
        return first and not (used.lm_calls or used.cache_hits or used.tokens or used.cost)

    def note_trial(self, used: Usage) -> None:
        """Warns, once, where limits cannot hold because scores do not say what they use."""
        limited = self.limits.max_tokens is not None or self.limits.max_cost is not None
        if limited and used.program_calls and self.is_unseen(used):
            logger.warning(
                "A trial was measured, and `score` has recorded no usage: max_tokens and max_cost do not "
                "hold. Call mpromptune.calls.usage.record in it, in its thread or in a copy of its context."
            )

    @property
    def overspent(self) -> float:
        """By how much the limit that was reached is exceeded, in its own unit."""
        rows = self._rows(self.meter.total)
        return next((used - limit for name, limit, used in rows if name == self.reached), 0.0)

    def begin_search(self) -> Meter:
        """The meter of the search, whose calls per second count from now on."""
        self._search_began = self._clock()
        return self.step(SEARCH)

    def calls_left(self, told: Usage, calls: int) -> tuple[str, int] | None:
        """How many program calls can still be paid, and the limit that says so; None if none does.

        Calls are taken to use on the average what those told have used. Only what was told counts,
        which is the same whatever the threads do; of time, what the clock says.

        Args:
            told: What the trials told so far have used.
            calls: Their program calls.
        """
        steps = [usage for name, usage in self.usage.items() if name != SEARCH]
        before = sum(steps, Usage())
        found: dict[str, int] = {}
        for name, limit, used in self._rows(before + told):
            took = MEASURE[name](told) if name != "max_seconds" else self._clock() - self._search_began
            if calls and took > 0:
                found[name] = max(0, math.floor((limit - used) * calls / took))
        return min(found.items(), key=lambda item: item[1]) if found else None

    def _rows(self, usage: Usage) -> Iterator[tuple[str, float, float]]:
        """Of every limit given: its name, its size, and what is used of it."""
        for name in LIMIT_NAMES:
            limit = getattr(self.limits, name)
            if limit is not None:
                elapsed = self._clock() - self._began
                yield name, limit, elapsed if name == "max_seconds" else MEASURE[name](usage)
