"""When further calls cannot pay: what is still to be gained, and how small a gain is nothing."""

from __future__ import annotations

from dataclasses import dataclass

# NOTE: part of a full evaluation's standard error that counts as no gain. The validation set is
# itself a sample, so the winner's score is known to one standard error (2.8 points at 80 % of 200
# examples). A gain of a tenth of it would widen that uncertainty, added in quadrature, by half a
# percent: nobody could tell it from the luck of the examples. It was reasoned, not tuned.
_NEGLIGIBLE = 0.1


@dataclass
class Stopping:
    """The user's rules for ending a search before its budget.

    Attributes:
        target: A mean score that is good enough.
        patience: Rounds in a row without a gain in sight after which to stop.
        quiet: Such rounds so far.
    """

    target: float | None = None
    patience: int | None = None
    quiet: int = 0

    def is_enough(self, score: float) -> bool:
        """Whether ``score`` reaches the target."""
        return self.target is not None and score >= self.target

    def is_hopeless(self) -> bool:
        """Whether there has been no gain in sight for long enough."""
        return self.patience is not None and self.quiet >= self.patience

    def note(self, gain: float, standard_error: float) -> None:
        """Takes down one round: the largest expected gain after it, and a full evaluation's error."""
        self.quiet = self.quiet + 1 if gain < _NEGLIGIBLE * standard_error else 0
