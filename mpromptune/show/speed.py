"""How long the rest of something takes, judged by how fast it went of late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# NOTE: "of late" is the last quarter of the time, so that an estimate is as steady as the run is long and
# still follows a provider that slows down; and at least a minute, in which most LM calls come back.
_SHARE, _LEAST = 0.25, 60.0
# NOTE: counts kept of that time: enough that dropping the oldest is not noticed.
_KEPT = 100


class Speed:
    """Counts what is done, with the time.

    Args:
        clock: Says the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: deque[tuple[float, int]] = deque()

    def note(self, done: int) -> None:
        """So many are done by now; the first count is where the time begins."""
        now = self._clock()
        window = max(_LEAST, _SHARE * (now - self._began))
        while len(self._counts) > 1 and self._counts[1][0] <= now - window:
            self._counts.popleft()
        if len(self._counts) > 1 and now - self._counts[-2][0] < window / _KEPT:
            self._counts.pop()
        self._counts.append((now, done))

    def seconds_for(self, rest: int) -> float | None:
        """For so many more; None where nothing tells."""
        if rest <= 0:
            return 0.0
        if not self._counts:
            return None
        (began, before), (_, done) = self._counts[0], self._counts[-1]
        return rest * (self._clock() - began) / (done - before) if done > before else None
