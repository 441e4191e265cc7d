"""Every score that came in: the one record of what was paid for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpromptune.execution.refusals import Refusals, are_few
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Row

Examples = tuple[int, ...]


@dataclass
class Ledger:
    """Scores by configuration and example; an example that was scored again keeps all its answers.

    Attributes:
        scores: Configuration to example to its scores, in the order in which they were told.
        calls: Program calls that gave a score.
        rounds: Rounds told.
        usage: What all trials have used, those that failed included.
        refusals: Which examples are answered, and for whom they fail.
    """

    scores: dict[Row, dict[int, list[float]]] = field(default_factory=dict)
    calls: int = 0
    rounds: int = 0
    usage: Usage = field(default_factory=Usage)
    refusals: Refusals = field(default_factory=Refusals)
    _used_by: dict[Row, tuple[int, Usage]] = field(default_factory=dict)  # with the calls that it was for

    def add(
        self,
        row: Row,
        measured: Mapping[int, float],
        usage: Usage | None = None,
        lost: Iterable[int] = (),
        refused: Iterable[int] = (),
    ) -> None:
        """Records one trial.

        Args:
            row: Its configuration.
            measured: Example to score.
            usage: What it used.
            lost: Examples that it has no score of.
            refused: Of those measured, the examples of which the prompt was refused.
        """
        by_example = self.scores.setdefault(row, {})
        for example, score in measured.items():
            by_example.setdefault(example, []).append(score)
        for example in measured.keys() - set(refused):
            self.refusals.note_answer(row, example)
        for example in (*lost, *refused):
            self.refusals.note_failure(row, example)
        self.calls += len(measured)
        if usage is not None:
            calls, before = self._used_by.get(row, (0, Usage()))
            self._used_by[row] = calls + len(measured), before + usage
            self.usage = self.usage + usage

    def rows(self) -> list[Row]:
        """Configurations with any score, in the order in which they were first told."""
        return [row for row, by_example in self.scores.items() if by_example]

    def means(self, row: Row) -> dict[int, float]:
        """Example to the mean of its scores, in the order of the examples.

        An example that is refused whatever the prompt says nothing about who was refused.
        """
        by_example = self.scores.get(row, {})
        refused = {e for e in self.refusals.unanswerable() if self.refusals.has_failed(row, e)}
        return {example: mean(by_example[example]) for example in sorted(by_example.keys() - refused)}

    def mean(self, row: Row) -> float:
        """Mean over the examples of the mean of each: answering one twice gives it no more weight.

        Not a number where there is no score.
        """
        means = list(self.means(row).values())
        return mean(means) if means else math.nan

    def covers(self, row: Row, n_examples: int) -> bool:
        """Whether ``row`` has a score on each of ``n_examples`` examples that can be answered.

        It need not have those on which it failed again and again, as long as they are few.
        """
        answered, unanswerable = self.scores.get(row, {}).keys(), self.refusals.unanswerable()
        own = self.refusals.given_up(row) - unanswerable
        is_whole = len(answered | unanswerable | own) == n_examples
        return is_whole and are_few(len(own), len(answered))

    def relative_use(self, of: Callable[[Usage], float], row: Row) -> float:
        """How many times the mean use of a call one of ``row`` takes; 1 where that is not known."""
        calls, used = self._used_by.get(row, (0, self.usage))
        mean_use = of(self.usage) / max(self.calls, 1)
        return of(used) / calls / mean_use if calls and mean_use else 1.0

    def is_not_worse(self, row: Row, baseline: Row) -> bool:
        """Whether ``row`` scores at least as well as ``baseline`` on what both were measured on."""
        ours, theirs = self.means(row), self.means(baseline)
        shared = ours.keys() & theirs.keys()
        return bool(shared) and sum(ours[e] for e in shared) >= sum(theirs[e] for e in shared)

    def best_so_far(self, ranked: Sequence[Row], baseline: Row, n_examples: int) -> Row:
        """Whom to return when the search is cut off.

        The first of ``ranked`` that is fully measured, or, where nothing is but the baseline, the
        first of all; passing over what scores worse than the baseline on the examples that both
        were measured on, or shares none with it. If nothing is left, the baseline; but where that has no
        score yet, there is nothing to pass over.
        """
        full = [row for row in ranked if row != baseline and self.covers(row, n_examples)]
        if not self.means(baseline):
            return (full or ranked)[0]
        return next((row for row in full or ranked if self.is_not_worse(row, baseline)), baseline)


def mean(values: list[float]) -> float:
    """The arithmetic mean; of numbers whose sum overflows, too."""
    total = sum(values)
    if math.isfinite(total):
        return total / len(values)
    largest = max(map(abs, values))
    return largest * (sum(value / largest for value in values) / len(values))
