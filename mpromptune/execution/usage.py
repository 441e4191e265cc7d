"""The usage of program calls: LM calls, tokens, cost and time, counted where it occurs."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Resources used.

    Attributes:
        lm_calls: Requests sent to a language model.
        cache_hits: Requests answered by a cache; they cost nothing.
        prompt_tokens: Tokens sent, without cache hits.
        completion_tokens: Tokens received, without cache hits.
        cost: US dollars, as far as prices are known.
        seconds: Time spent in program calls, including waits before retries, summed over threads.
        program_calls: Number of runs of the program on an example, including every attempt.
    """

    lm_calls: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    program_calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return self._each(operator.add, other)

    def __sub__(self, other: Usage) -> Usage:
        return self._each(operator.sub, other)

    def at_least(self, other: Usage) -> Usage:
        """The maximum of each field."""
        return self._each(max, other)

    def _each(self, function: Callable[..., Any], other: Usage) -> Usage:
        # Not `astuple`, which would take a tenth of the time of a search.
        return Usage(*map(function, vars(self).values(), vars(other).values()))

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, float]:
        """The fields that are not zero, for JSON; `Usage(**...)` restores it."""
        return {name: value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        return (
            f"{self.program_calls} program calls, {self.lm_calls} LM calls and {self.cache_hits} cache hits, "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens, ${self.cost:.4f}"
        )


class StepUsage(dict[str, Usage]):
    """Usage by step: ``"bootstrap"``, ``"propose"``, ``"search"``."""

    @property
    def total(self) -> Usage:
        """The usage of all steps together."""
        return sum(self.values(), Usage())


class Meter:
    """Sums usage, for itself and for its parent; it is safe for threads."""

    def __init__(self, parent: Meter | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._parent = parent
        self._clock = clock
        self._lock = threading.Lock()
        self._total = Usage()
        self._waiting = 0  # number of threads that wait now
        self._waited = 0.0  # seconds; minus the start time of the present wait, if there is one

    @property
    def total(self) -> Usage:
        """The usage recorded so far."""
        return self._total

    def add(self, usage: Usage) -> None:
        """Record usage, here and in all parents."""
        with self._lock:
            self._total = self._total + usage
        if self._parent is not None:
            self._parent.add(usage)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for waiting on purpose, which must not count against a timeout."""
        self._count_waiting(1)
        try:
            yield
        finally:
            self._count_waiting(-1)

    @property
    def waited(self) -> float:
        """Seconds of waiting on purpose so far; simultaneous waits count once."""
        with self._lock:
            return self._waited + (self._clock() if self._waiting else 0.0)

    def _count_waiting(self, change: int) -> None:
        with self._lock:
            before, self._waiting = self._waiting, self._waiting + change
            if not before:
                self._waited -= self._clock()
            elif not self._waiting:
                self._waited += self._clock()
        if self._parent is not None:
            self._parent._count_waiting(change)


_METER: ContextVar[Meter | None] = ContextVar("mpromptune_meter", default=None)


def current_meter() -> Meter | None:
    """The meter of this context."""
    return _METER.get()


@contextmanager
def metered(meter: Meter | None = None) -> Iterator[Meter]:
    """A context, and copies of it, whose usage is recorded in ``meter``; by default a new child meter."""
    inner = Meter(_METER.get()) if meter is None else meter
    token = _METER.set(inner)
    try:
        yield inner
    finally:
        _METER.reset(token)


def record(usage: Usage) -> None:
    """Add usage to the meter of this context, if there is one; for scores that know their usage."""
    meter = _METER.get()
    if meter is not None:
        meter.add(usage)
