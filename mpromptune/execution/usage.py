"""What program calls use up: LM calls, tokens, money and time, counted where they happen."""

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
        lm_calls: Requests that were sent to a language model.
        cache_hits: Requests that a cache answered; they cost nothing.
        prompt_tokens: Tokens sent, cache hits apart.
        completion_tokens: Tokens received, cache hits apart.
        cost: US dollars, as far as prices are known.
        seconds: Time spent in program calls, waiting for a retry included, added up over threads.
        program_calls: Times that the program was run on an example, every attempt counted.
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
        """The larger of each."""
        return self._each(max, other)

    def _each(self, function: Callable[..., Any], other: Usage) -> Usage:
        return Usage(
            *map(function, vars(self).values(), vars(other).values())
        )  # a tenth of a search with `astuple`

    @property
    def tokens(self) -> int:
        """Tokens in both directions."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, float]:
        """What is not zero, as JSON takes it; `Usage(**...)` reads it back."""
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
        """All steps together."""
        return sum(self.values(), Usage())


class Meter:
    """Adds up usage, for itself and for the parent that it is a part of; threads may share one."""

    def __init__(self, parent: Meter | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._parent = parent
        self._clock = clock
        self._lock = threading.Lock()
        self._total = Usage()
        self._waiting = 0  # how many wait now
        self._waited = 0.0  # seconds; less the time at which the present wait began, if there is one

    @property
    def total(self) -> Usage:
        """Everything recorded so far."""
        return self._total

    def add(self, usage: Usage) -> None:
        """Records usage, here and in everything that this is a part of."""
        self.attribute(usage)
        if self._parent is not None:
            self._parent.add(usage)

    def attribute(self, usage: Usage) -> None:
        """Records here alone what the whole has counted before."""
        with self._lock:
            self._total = self._total + usage

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time that something waits by our own will, which no timeout should hold against it."""
        self._count_waiting(1)
        try:
            yield
        finally:
            self._count_waiting(-1)

    @property
    def waited(self) -> float:
        """Seconds of such waiting up to now, counted once where several wait at the same time."""
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
    """What is recorded in this context, and in copies of it, goes to a meter: by default a new part."""
    inner = Meter(_METER.get()) if meter is None else meter
    token = _METER.set(inner)
    try:
        yield inner
    finally:
        _METER.reset(token)


def record(usage: Usage) -> None:
    """Adds to the meter of this context, if there is one: for scores that know what they cost."""
    meter = _METER.get()
    if meter is not None:
        meter.add(usage)
