"""What program calls use up: LM calls, tokens, money and time, counted where they happen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Usage:
    """Resources used.

    Attributes:
        lm_calls: Requests that were sent to a language model.
        cache_hits: Requests that a cache answered; they cost nothing.
        prompt_tokens: Tokens sent, cache hits apart.
        completion_tokens: Tokens received, cache hits apart.
        cost: US dollars, as far as prices are known.
        seconds: Time spent in program calls, waiting for a retry included.
    """

    lm_calls: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens(self) -> int:
        """Tokens in both directions."""
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Adds up usage; threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Usage()

    @property
    def total(self) -> Usage:
        """Everything recorded so far."""
        return self._total

    def add(self, usage: Usage) -> None:
        """Records usage."""
        with self._lock:
            self._total = self._total + usage


_METER: ContextVar[Meter | None] = ContextVar("mpromptune_meter", default=None)


@contextmanager
def metered() -> Iterator[Meter]:
    """What is recorded in this context, and in threads that inherit it, goes to a new meter."""
    meter = Meter()
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)


def record(usage: Usage) -> None:
    """Adds to the meter of this context, if there is one: for scores that know what they cost."""
    meter = _METER.get()
    if meter is not None:
        meter.add(usage)
