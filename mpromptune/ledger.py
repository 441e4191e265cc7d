"""Every score that came in: the one record of what was paid for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpromptune.space import Row


@dataclass
class Ledger:
    """Scores by configuration and example; an example that was scored again keeps all its answers.

    Attributes:
        scores: Configuration to example to its scores, in the order in which they were told.
        calls: Program calls that gave a score.
        rounds: Rounds told.
    """

    scores: dict[Row, dict[int, list[float]]] = field(default_factory=dict)
    calls: int = 0
    rounds: int = 0

    def add(self, row: Row, measured: Mapping[int, float]) -> None:
        """Records one trial's scores by example."""
        by_example = self.scores.setdefault(row, {})
        for example, score in measured.items():
            by_example.setdefault(example, []).append(score)
        self.calls += len(measured)

    def rows(self) -> list[Row]:
        """Configurations with any score, in the order in which they were first told."""
        return [row for row, by_example in self.scores.items() if by_example]

    def means(self, row: Row) -> dict[int, float]:
        """Example to the mean of its scores, in the order of the examples."""
        by_example = self.scores.get(row, {})
        return {example: mean(by_example[example]) for example in sorted(by_example)}

    def mean(self, row: Row) -> float:
        """Mean over the examples of the mean of each: answering one twice gives it no more weight."""
        return mean(list(self.means(row).values()))

    def covers(self, row: Row, n_examples: int) -> bool:
        """Whether ``row`` has a score on each of ``n_examples`` examples."""
        return len(self.scores.get(row, ())) == n_examples


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
