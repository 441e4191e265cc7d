"""How far a search has got, as plain numbers for whoever watches it, and how long the rest takes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mpromptune.execution.attempts import Load
from mpromptune.execution.limits import Limits
from mpromptune.execution.usage import Usage

logger = logging.getLogger(__name__)

# NOTE: the standard normal quantile of 97.5 %: the posterior of a mean score is normal.
_QUANTILE = 1.959964
# NOTE: the speed is that of the last quarter of the time, so that an estimate is as steady as the run is long
# and still follows a provider that slows down; and of a minute at least, in which most LM calls come back.
_SHARE, _LEAST = 0.25, 60.0
# NOTE: counts kept of that time: enough that dropping the oldest is not noticed.
_KEPT = 100


@dataclass(frozen=True)
class Standing:
    """What is thought of one configuration.

    Attributes:
        mean: Estimate of its mean score over all examples, by the surrogate once there is one; before,
            and with samplers that fit none, the mean of its scores.
        std: Standard deviation of that estimate.
        measured: Mean of its scores so far; when the search has finished, its score in the result.
        examples: Validation examples that it has been measured on.
    """

    mean: float
    std: float
    measured: float
    examples: int

    @property
    def margin(self) -> float:
        """Half of the 95 % credible interval."""
        return _QUANTILE * self.std

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % credible interval of the mean score."""
        return self.mean - self.margin, self.mean + self.margin


@dataclass(frozen=True)
class Progress:
    """A search as it stands.

    Attributes:
        calls: Program calls that have come back, those of earlier runs too.
        max_calls: The budget; a search may end before it.
        trials: Trials told.
        batches: Batches told.
        n_examples: Size of the validation set.
        best: The configuration with the highest estimate; when finished, the winner. None before
            anything was measured.
        baseline: The one that it is compared with, once it has been measured.
        load: Calls in flight, and how many may be.
        usage: Everything used so far; of a compile, by all of its steps.
        limits: What may be used.
        seconds: Since this run of the search began.
        seconds_left: Until the budget or a limit is used up, at the speed of late; None if unknown.
        finished: Whether the search has ended, and the winner is known.
    """

    calls: int
    max_calls: int
    trials: int
    batches: int
    n_examples: int
    best: Standing | None
    baseline: Standing | None
    load: Load
    usage: Usage
    limits: Limits
    seconds: float
    seconds_left: float | None
    finished: bool = False


OnProgress = Callable[[Progress], object]


def together(*listeners: OnProgress | None) -> OnProgress | None:
    """Several listeners as one, each left out once it has raised an error; None where there are none."""
    active = [listener for listener in listeners if listener is not None]

    def tell(progress: Progress) -> None:
        for listener in tuple(active):
            try:
                listener(progress)
            except Exception:
                active.remove(listener)
                logger.exception("Progress is not reported to %r any more; the search goes on.", listener)

    return tell if active else None


class Speed:
    """How fast something has been done of late.

    Args:
        clock: Says the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: deque[tuple[float, int]] = deque()

    def note(self, done: int) -> None:
        """So many are done by now; the time begins with the first count."""
        now = self._clock()
        window = max(_LEAST, _SHARE * (now - self._began))
        while len(self._counts) > 1 and self._counts[1][0] <= now - window:
            self._counts.popleft()
        if len(self._counts) > 1 and now - self._counts[-2][0] < window / _KEPT:
            self._counts.pop()
        self._counts.append((now, done))

    def seconds_for(self, rest: int) -> float | None:
        """Seconds that so many more will take; None where that is not known."""
        if rest <= 0:
            return 0.0
        if not self._counts:
            return None
        (began, before), (_, done) = self._counts[0], self._counts[-1]
        return rest * (self._clock() - began) / (done - before) if done > before else None
