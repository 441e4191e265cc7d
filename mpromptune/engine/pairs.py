"""Which pairs of configuration and example were asked, which failed, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from mpromptune.execution.refusals import TRIES, are_few
from mpromptune.model.space import Row
from mpromptune.storage.ledger import Examples

# Trials of one configuration that may fail before it is given up, unless on few of its examples.
MAX_FAILURES = 3


@dataclass
class Pairs:
    """Each pair is paid once, unless it fails.

    Attributes:
        n_examples: Size of the validation set.
        max_calls: Budget of program calls.
        assigned: Configuration to the examples measured or being measured.
        failed: Configuration to the examples that each of its failed trials lacks.
        lost: Configuration to the examples that could not be measured.
        aside: Examples that cannot be answered: only finalists are asked on them once more.
        spent: Calls made or committed to.
        price: How many times the average call one of a configuration costs.
    """

    n_examples: int
    max_calls: int
    assigned: dict[Row, set[int]] = field(default_factory=dict)
    failed: dict[Row, list[set[int]]] = field(default_factory=dict)
    lost: dict[Row, set[int]] = field(default_factory=dict)
    aside: AbstractSet[int] = frozenset()
    spent: int = 0
    price: Callable[[Row], float] = lambda row: 1.0

    @property
    def remaining(self) -> int:
        """Calls not yet committed to."""
        return self.max_calls - self.spent

    def open_of(self, row: Row, order: Sequence[int]) -> Examples:
        """The examples that ``row`` may be explored on, in order; those that failed before come last."""
        return self._lacking(row, order, self.aside)

    def missing(self, row: Row) -> Examples:
        """The examples that a finalist still lacks, failed ones last.

        Of those set aside, what it has not been asked on: a passing failure may be over.
        """
        return self._lacking(row, range(self.n_examples), self.aside & self.lost.get(row, set()))

    def _lacking(self, row: Row, order: Sequence[int], without: AbstractSet[int]) -> Examples:
        closed, lost = self._asked(row) | without, self.lost.get(row, set())
        return tuple(sorted((e for e in order if e not in closed), key=(lost | self.aside).__contains__))

    def has_tried_all(self, row: Row) -> bool:
        """Whether ``row`` lacks only examples that could not be measured before."""
        return self.lost.get(row, set()).issuperset(self.missing(row))

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Commits to measuring ``row`` on ``examples``."""
        self.assigned.setdefault(row, set()).update(examples)
        self.spent += len(examples)

    def release(self, row: Row, examples: Iterable[int]) -> AbstractSet[int]:
        """Takes back what could not be measured: its budget returns.

        Returns:
            What could not be in an earlier trial either.
        """
        lost = set(examples)
        self.assigned[row] -= lost
        self.lost.setdefault(row, set()).update(lost)
        self.spent -= len(lost)
        if lost:
            self.failed.setdefault(row, []).append(lost)
        return lost & self._given_up(row)

    def _given_up(self, row: Row) -> AbstractSet[int]:
        """Examples that enough trials of ``row`` lack."""
        times = Counter(example for lost in self.failed.get(row, ()) for example in lost)
        return {example for example, failures in times.items() if failures >= TRIES}

    def is_dropped(self, row: Row) -> bool:
        """Whether so many trials of ``row``, and examples, failed that no further call is risked on it."""
        failures = sum(not lost <= self.aside for lost in self.failed.get(row, ()))
        return failures >= MAX_FAILURES and not self._lacks_few(row)

    def _lacks_few(self, row: Row) -> bool:
        """Whether ``row`` fails on so few examples that it can be judged on the others."""
        answered = self.assigned.get(row, set())
        lost = self.lost.get(row, set()) - answered - self.aside
        return are_few(len(lost), len(answered))

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``."""
        self.failed.pop(row, None)

    def cost(self, rows: Iterable[Row]) -> float:
        """What measuring ``rows`` on all that they lack takes, in average calls; nothing for dropped ones."""
        return sum(len(self.missing(row)) * self.price(row) for row in rows if not self.is_dropped(row))

    def is_open(self, row: Row) -> bool:
        """Whether ``row`` has examples left to be explored on."""
        return len(self._asked(row) | self.aside) < self.n_examples and not self.is_dropped(row)

    def _asked(self, row: Row) -> AbstractSet[int]:
        """Examples that ``row`` is measured on, being measured on, or failed on often enough."""
        given_up = self._given_up(row) if self._lacks_few(row) else set()
        return self.assigned.get(row, set()) | given_up
