"""The progress of a search as plain data for callbacks, and the time that the rest will take."""

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
QUANTILE = 1.959964
# NOTE: the speed is measured over the last quarter of the time, so that estimates of long runs are steady and
# still follow a provider that slows down; but over at least a minute, in which most LM calls end.
_SHARE, _LEAST = 0.25, 60.0
# NOTE: number of counts kept for that time; enough that dropping the oldest one changes little.
_KEPT = 100


@dataclass(frozen=True)
class Standing:
    """The estimated score of one configuration.

    Attributes:
        mean: Estimate of its mean score over all examples: by the surrogate if there is one, otherwise the
            mean of its scores.
        std: Standard deviation of that estimate.
        measured: Mean of its scores so far; when the search has finished, its score in the result.
        examples: Number of validation examples on which it was measured.
    """

    mean: float
    std: float
    measured: float
    examples: int

    @property
    def margin(self) -> float:
        """Half of the 95 % credible interval."""
        return QUANTILE * self.std

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % credible interval of the mean score."""
        return self.mean - self.margin, self.mean + self.margin


@dataclass(frozen=True)
class Progress:
    """The progress of a search.

    Attributes:
        calls: Program calls that have ended, including those of earlier runs.
        max_calls: The budget; a search may end before it is spent.
        trials: Trials told.
        batches: Batches told.
        n_examples: Size of the validation set.
        best: The configuration with the highest estimate, or the winner when finished. None without scores.
        baseline: The baseline; None before its first score.
        load: Calls in flight, and their limit.
        usage: The usage so far; in a compile, of all steps.
        limits: The limits on usage.
        seconds: Seconds since this run of the search began.
        seconds_left: Seconds until the budget or a limit is reached, at the recent speed; None if unknown.
        finished: Whether the search has ended, and the winner is known.
        proposals: Proposals begun; 0 if all candidates are written before the search.
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
    proposals: int = 0


OnProgress = Callable[[Progress], object]


def together(*listeners: OnProgress | None) -> OnProgress | None:
    """One callback for several; each is dropped when it raises an error. None if there are none."""
    active = [listener for listener in listeners if listener is not None]

    def tell(progress: Progress) -> None:
        for listener in tuple(active):
            try:
                listener(progress)
            except Exception:
                active.remove(listener)
                logger.exception("Progress is not reported to %r any more; the search continues.", listener)

    return tell if active else None


class Speed:
    """The recent speed of a process.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: deque[tuple[float, int]] = deque()

    def note(self, done: int) -> None:
        """Note the number done until now; the time begins with the first call."""
        now = self._clock()
        window = max(_LEAST, _SHARE * (now - self._began))
        while len(self._counts) > 1 and self._counts[1][0] <= now - window:
            self._counts.popleft()
        if len(self._counts) > 1 and now - self._counts[-2][0] < window / _KEPT:
            self._counts.pop()
        self._counts.append((now, done))

    def seconds_for(self, rest: int) -> float | None:
        """Seconds that ``rest`` more will take; None if it is not known."""
        if rest <= 0:
            return 0.0
        if not self._counts:
            return None
        (began, before), (_, done) = self._counts[0], self._counts[-1]
        return rest * (self._clock() - began) / (done - before) if done > before else None
