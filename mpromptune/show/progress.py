"""How far a search has got, as plain numbers for whoever watches it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpromptune.execution.limits import Limits
from mpromptune.execution.throttle import Load
from mpromptune.execution.usage import Usage

logger = logging.getLogger(__name__)

# NOTE: the standard normal quantile of 97.5 %: the posterior of a mean score is normal.
_QUANTILE = 1.959964


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
        rounds: Rounds told.
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
    rounds: int
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


class Listeners:
    """Several as one; each is left alone once it has raised an error.

    Args:
        listeners: Whom to tell, in this order.
    """

    def __init__(self, listeners: Sequence[OnProgress]) -> None:
        self._listeners = list(listeners)

    @classmethod
    def of(cls, *listeners: OnProgress | None) -> Listeners | None:
        """Those that there are; None for none."""
        given = [listener for listener in listeners if listener is not None]
        return cls(given) if given else None

    def __call__(self, progress: Progress) -> None:
        """Tells all of them."""
        for listener in tuple(self._listeners):
            try:
                listener(progress)
            except Exception:
                self._listeners.remove(listener)
                logger.exception("Progress is not reported to %r any more; the search goes on.", listener)
