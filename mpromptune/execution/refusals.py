"""What cannot be answered: for a filter of the provider's, say, or because it takes too long."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from mpromptune.model.space import Row

# Configurations, answered elsewhere, that an example has to fail for before it is held to be its own fault.
_WITNESSES = 2
# Trials that have to fail on an example before it is held to be unanswerable for their configuration.
TRIES = 2
# NOTE: part of the examples that a configuration may fail on, and yet be compared on the others. It was
# reasoned, not tuned: a filter or a time limit hits a few pairs in a hundred, and who fails on one of ten has
# a fault of its own.
TOLERATED = 0.1


def are_few(lost: int, answered: int) -> bool:
    """Whether what fails on ``lost`` examples can be judged by the ``answered`` ones."""
    return lost <= TOLERATED * (lost + answered)


@dataclass
class Refusals:
    """Which examples are answered, and for whom they fail.

    Attributes:
        answered: How often each example was answered.
        refused: For each example, how often it failed for a configuration, and was not answered since.
        sound: The configurations that were answered on any example.
    """

    answered: Counter[int] = field(default_factory=Counter)
    refused: defaultdict[int, Counter[Row]] = field(default_factory=lambda: defaultdict(Counter))
    sound: set[Row] = field(default_factory=set)

    def note_answer(self, row: Row, example: int) -> None:
        """``row`` was answered on ``example``, whether or not it failed there before."""
        self.answered[example] += 1
        if example in self.refused:
            self.refused[example].pop(row, None)
        self.sound.add(row)

    def note_failure(self, row: Row, example: int) -> None:
        """``row`` was not, this time."""
        self.refused[example][row] += 1

    def is_unanswerable(self, example: int) -> bool:
        """Whether an example fails for configurations that are fine, and for more than it is answered."""
        witnesses = len(self.refused.get(example, Counter()).keys() & self.sound)
        return witnesses >= max(_WITNESSES, self.answered[example] + 1)

    def unanswerable(self) -> frozenset[int]:
        """All such examples; an answer can take one out again."""
        return frozenset(filter(self.is_unanswerable, self.refused))

    def has_failed(self, row: Row, example: int) -> bool:
        """Whether ``row`` failed on it, and was not answered since."""
        return row in self.refused.get(example, ())

    def given_up(self, row: Row) -> frozenset[int]:
        """Examples on which ``row`` was tried often enough."""
        return frozenset(e for e, failures in self.refused.items() if failures[row] >= TRIES)
