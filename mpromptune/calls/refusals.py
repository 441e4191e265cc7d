"""Examples that nobody can be asked: for a filter of the provider's, say, or because they take too long."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from mpromptune.model.space import Row

# Configurations, answered elsewhere, that an example has to fail for before it is held to be its own fault.
_WITNESSES = 2


@dataclass
class Refusals:
    """Which examples are answered, and for whom they fail.

    Attributes:
        answered: How often each example was answered.
        refused: The configurations for which each example failed, and was not answered since.
        sound: The configurations that were answered on any example.
    """

    answered: Counter[int] = field(default_factory=Counter)
    refused: defaultdict[int, set[Row]] = field(default_factory=lambda: defaultdict(set))
    sound: set[Row] = field(default_factory=set)

    def note_answer(self, row: Row, example: int) -> None:
        """``row`` was answered on ``example``, whether or not it failed there before."""
        self.answered[example] += 1
        if example in self.refused:
            self.refused[example].discard(row)
        self.sound.add(row)

    def note_failure(self, row: Row, example: int) -> None:
        """``row`` was not, this time."""
        self.refused[example].add(row)

    def is_unanswerable(self, example: int) -> bool:
        """Whether an example fails for configurations that are fine, and for more than it is answered."""
        witnesses = len(self.refused.get(example, set()) & self.sound)
        return witnesses >= max(_WITNESSES, self.answered[example] + 1)

    def never_answered(self) -> frozenset[int]:
        """Such examples that were not answered even once."""
        return frozenset(e for e in self.refused if not self.answered[e] and self.is_unanswerable(e))
