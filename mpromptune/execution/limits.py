"""Limits on the usage of a search other than program calls: tokens, cost and time."""

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

PROPOSE = "propose"  # name of the step that writes candidates, and of proposals during the search
SEARCH = "search"  # name of the step that measures trials


@dataclass(frozen=True)
class Limits:
    """Limits on usage; None means no limit.

    Attributes:
        max_tokens: Prompt and completion tokens together, without cache hits.
        max_cost: US dollars.
        max_seconds: Wall-clock time in seconds.
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


# NOTE: a call that takes this many times as long as the mean call is assumed to hang: the durations of calls
# of one program and LM differ mostly by the length of the answers.
_MEAN_CALLS = 10

# The part of a usage that each limit refers to; time is read from a clock.
MEASURE: dict[str, Callable[[Usage], float]] = {
    "max_tokens": lambda usage: usage.tokens,
    "max_cost": lambda usage: usage.cost,
    "max_seconds": lambda usage: 0.0,
}


def patience(usage: Usage, calls: int, least: float, most: float) -> float:
    """Seconds to wait for calls in flight when no other may begin: ten times the mean duration of a call.

    The mean is that of ``usage`` over ``calls``; the result is between ``least`` and ``most``.
    """
    return min(most, max(least, _MEAN_CALLS * usage.seconds / calls)) if calls else most


class Budget:
    """Limits that have begun to count, and the meters of the steps that they cover.

    Attributes:
        limits: The limits.
        reached: Name of the limit that was reached, after which nothing more may begin.
        patience: Seconds that calls in flight may still take when tokens or cost have reached their limit;
            ``grace``, as for time, until the search sets it.
        meter: Counts the usage of all steps.
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
        self.meter = Meter(current_meter())  # also counts for the meter of the surrounding context
        self._steps: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._has_seen_a_call = False
        self._clock = clock
        self._began = self._search_began = clock()
        self._deadline = self._began + (self.limits.max_seconds or math.inf)
        self._before = Usage()  # that of the steps before the search
        self._waited_since: float | None = None  # time at which a limit was reached

    def step(self, name: str) -> Meter:
        """The meter of a step, which also counts for the whole."""
        with self._lock:
            return self._steps.setdefault(name, Meter(self.meter))

    def begin_search(self) -> Meter:
        """The meter of the search; its calls per second are measured from now on."""
        self._search_began = self._clock()
        self._before = sum((usage for name, usage in self.usage.items() if name != SEARCH), Usage())
        return self.step(SEARCH)

    @property
    def usage(self) -> StepUsage:
        """The usage so far, by step."""
        return StepUsage({name: meter.total for name, meter in self._steps.items()})

    def admits(self) -> bool:
        """Whether anything more may begin; if not, `reached` is the limit that forbids it."""
        self.reached = self.reached or self._used_up()
        return self.reached is None

    @property
    def is_late(self) -> bool:
        """Whether ``max_seconds`` have passed; calls in flight may still use their ``grace``."""
        return self._clock() >= self._deadline

    def is_over(self) -> bool:
        """Whether to stop waiting for calls in flight: a limit was reached and the time for them is over."""
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
        """A context in which all waiting ends when the budget `is_over`.

        Raises:
            SearchStoppedError: A limit was reached before there was anything to return.
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
        return SearchStoppedError(
            f"{self.reached}={limit} was used up {when}: {self.usage.total}. Raise it and make the same call "
            "again; with a storage, what was answered is not paid for twice."
        )

    def overspent(self, name: str | None) -> float:
        """By how much a limit is exceeded, in its unit: a number of tokens is an int.

        Args:
            name: The limit; None for the first one that is exceeded.
        """
        left = self._left(self.meter.total).get(name or self._used_up() or "", 0.0)
        return type(left)(0) - min(left, 0)

    def calls_left(self, told: Usage, calls: int, proposed: Usage | None = None) -> tuple[str, int] | None:
        """The strictest limit, and the number of program calls that it still allows; None without limits.

        Further calls are assumed to use as much as the mean of the ``calls`` of trials ``told`` so far, and
        proposals have used ``proposed``; neither depends on the timing of threads. For time, the mean is
        measured by the clock.
        """
        found: dict[str, int] = {}
        for name, left in self._left(self._before + told + (proposed or Usage())).items():
            took = MEASURE[name](told) if name != "max_seconds" else self._clock() - self._search_began
            if calls and took > 0:
                found[name] = max(0, math.floor(left * calls / took))
        return min(found.items(), key=lambda item: item[1]) if found else None

    def starts_unseen(self, used: Usage) -> bool:
        """Whether this call is the first one and its usage was not counted."""
        with self._lock:
            is_first, self._has_seen_a_call = not self._has_seen_a_call, True
        return is_first and not (used.lm_calls or used.cache_hits or used.tokens or used.cost)

    def note_trial(self, used: Usage) -> None:
        """Warn once if limits cannot hold because ``score`` does not record its usage."""
        limited = self.limits.max_tokens is not None or self.limits.max_cost is not None
        if limited and used.program_calls and self.starts_unseen(used):
            logger.warning(
                "A trial was measured, but `score` has recorded no usage: max_tokens and max_cost have no "
                "effect. Call mpromptune.execution.usage.record in `score`, in its thread or in a copy of "
                "its context."
            )

    def _used_up(self) -> str | None:
        return next((name for name, left in self._left(self.meter.total).items() if left <= 0), None)

    def _left(self, usage: Usage) -> dict[str, float]:
        """The remainder of every limit, in its unit."""
        used = {name: measure(usage) for name, measure in MEASURE.items()}
        used["max_seconds"] = self._clock() - self._began
        limits = {name: getattr(self.limits, name) for name in MEASURE}
        return {name: limit - used[name] for name, limit in limits.items() if limit is not None}
