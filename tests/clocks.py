"""A clock for tests: nothing has to wait."""

from __future__ import annotations


class Clock:
    """Moves only when it is told to, or slept on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
