r"""An outage or broken candidates? Whose failures the last ones were.

A candidate that cannot be answered fails wherever it is asked, while others are answered. In an
outage nobody is answered any more, whoever is asked: those least of all expected to fail among them.
So only failures after the last success count, in the order in which calls came back, and the
question is how likely they are if every configuration failed by itself:

    (f + 1) / (s + f + 2)       for each failure of one with s successes and f failures before,
    (b + 1) / (n + 2)           once for one that was never answered before, where b of n
                                configurations have been found to fail on everything,
    1                           for one of these b.

These are Laplace's rule of succession; a candidate that fails always is one event, not many.

Nor is an example that nobody can be asked, say for a filter of the provider's, a sign of anything: what
configurations lack in the end is such examples, and then nothing but these may be asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from mpromptune.execution.pool import Outcome
from mpromptune.execution.refusals import Refusals
from mpromptune.model.space import Row

# NOTE: below this, failures are not the candidates' own. It was reasoned, not tuned: where ten of ten
# configurations are fine, two of them that were answered ten times and then fail twice each are below
# it (5e-5), and so are three new ones that fail (6e-4); two new ones (7e-3), or one of the ten that
# fails once next to a new one (7e-3), are not.
_OWN_FAULT = 1e-3

Answer = tuple[Row, Outcome]


def last_failures(answers: Iterable[Answer]) -> list[Answer]:
    """Those after the last success, in the order in which they came back; skipped calls are no answers."""
    run: list[Answer] = []
    for row, outcome in sorted(answers, key=lambda answer: answer[1].order):
        if outcome.score is not None:
            run.clear()
        elif outcome.error is not None:
            run.append((row, outcome))
    return run


def are_several(failures: Sequence[Answer]) -> bool:
    """Whether they are of more than one configuration, and of more than one example."""
    return len({row for row, _ in failures}) > 1 and len({outcome.example for _, outcome in failures}) > 1


@dataclass
class Reliability:
    """How often each configuration was answered, and how often it failed.

    Attributes:
        successes: By configuration.
        failures: By configuration.
        refusals: Which examples are answered, and for whom they fail.
    """

    successes: Counter[Row] = field(default_factory=Counter)
    failures: Counter[Row] = field(default_factory=Counter)
    refusals: Refusals = field(default_factory=Refusals)

    def note(self, answers: Iterable[Answer]) -> None:
        """Learns from calls that came back."""
        for row, outcome in answers:
            self.successes[row] += outcome.score is not None
            self.failures[row] += outcome.error is not None
            if outcome.score is not None:
                self.refusals.note_answer(row, outcome.example)
            if outcome.error is not None:
                self.refusals.note_failure(row, outcome.example)

    def after(self, answers: Sequence[Answer], run: Sequence[Answer]) -> Reliability:
        """The same with these answers, but for a run of them that is to be judged."""
        judged = {id(outcome) for _, outcome in run}
        known = deepcopy(self)
        known.note(answer for answer in answers if id(answer[1]) not in judged)
        return known

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever answered."""
        return not any(self.successes.values())

    def is_outage(self, run: Sequence[Answer], many: int) -> bool:
        """Whether these failures in a row are too unlikely to be the configurations' own.

        Args:
            run: The failures.
            many: So many it takes where they are all of one configuration, or of one example.
        """
        if not are_several(run) and len(run) < many:
            return False
        likelihood = 1.0
        for row, times in Counter(row for row, _ in run).items():
            likelihood *= self._chance(row, times)
        return likelihood < _OWN_FAULT

    def _chance(self, row: Row, times: int) -> float:
        successes, failures = self.successes[row], self.failures[row]
        if successes:
            return float(((failures + 1) / (successes + failures + 2)) ** times)
        if failures:
            return 1.0
        known = [r for r in {*self.successes, *self.failures} if self.successes[r] or self.failures[r]]
        broken = sum(not self.successes[r] for r in known)
        return (broken + 1) / (len(known) + 2)
