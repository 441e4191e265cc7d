r"""An outage or broken candidates? Whose failures the last ones were.

A candidate that cannot be answered fails wherever it is asked, while others are answered. In an outage
nobody is answered any more, whoever is asked: those least of all expected to fail among them. So only
failures after the last success count, in the order in which calls came back, and the question is how likely
they are if every configuration failed by itself:

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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from mpromptune.engine.scores import Failures
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.pool import Outcome
from mpromptune.model.space import Row

# NOTE: below this, failures are not the candidates' own. It was reasoned, not tuned: where ten of ten
# configurations are fine, two of them that were answered ten times and then fail twice each are below
# it (5e-5), and so are three new ones that fail (6e-4); two new ones (7e-3), or one of the ten that
# fails once next to a new one (7e-3), are not.
_OWN_FAULT = 1e-3
# Small batches in a row without a single answer that are read as an outage.
_BARREN_BATCHES = 10

Answer = tuple[Row, Outcome]
# What is under way: answers that have come back, and calls that have not.
InHand = Callable[[], tuple[list[Answer], list[Future[Outcome]]]]


@dataclass
class Outage:
    """Judges every batch before it is told.

    To it a failure is one whether it is scored or not. A study does not say which scores were failures, so
    no plan may know what is known here.

    Attributes:
        verdict: On a failed outcome; None for a scored or a skipped one.
        many: Failures that are read as an outage, though all of one configuration or of one example.
    """

    verdict: Callable[[Outcome], Verdict | None]
    many: int
    barren: int = 0  # batches in a row that the infrastructure has failed on
    _successes: Counter[Row] = field(default_factory=Counter)
    _errors: Counter[Row] = field(default_factory=Counter)
    _failures: Failures = field(default_factory=Failures)

    def alarm(self, batch: Sequence[Answer], in_hand: InHand) -> tuple[str, BaseException] | None:
        """What the search has to stop on, and the error behind it; None when the batch may be told.

        Args:
            batch: Its answers.
            in_hand: Those of all batches under way.
        """
        answers, run = self._last_failures(batch, in_hand)
        failures = [answer for answer in run if not self._failures.is_unanswerable(answer[1].example)]
        if failures or not run:
            fresh = [(row, o) for row, o in failures if not self._failures.has_failed(row, o.example)]
            if self._is_barren(batch, answers, failures, fresh):
                return f"all {len(batch)} calls of a batch failing", _error(failures)
            if fresh and self._is_outage(fresh, answers):
                return f"the last {len(fresh)} calls failing, whatever was asked", _error(fresh)
        self.note(batch)
        return None

    def note(self, batch: Iterable[Answer]) -> None:
        """Learns from answers; what an earlier run has failed on has neither a score nor an error."""
        for row, outcome in batch:
            is_answered, example = outcome.score is not None, {outcome.example}
            (self._successes if is_answered else self._errors)[row] += 1
            self._failures.note(row, *((example, set()) if is_answered else (set(), example)))

    def _last_failures(self, batch: Sequence[Answer], in_hand: InHand) -> tuple[list[Answer], list[Answer]]:
        """All answers in hand, and the failures since the last success if any is of this batch.

        Calls of later batches may be signs of life; they are waited for while that is open.
        """
        own = {id(outcome) for _, outcome in batch}
        while True:
            answers, pending = in_hand()
            run = last_failures(answers)
            if not any(id(outcome) in own for _, outcome in run):
                return answers, []
            if not pending:
                return answers, run
            wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)

    def _is_barren(
        self,
        batch: Sequence[Answer],
        answers: Sequence[Answer],
        failures: Sequence[Answer],
        fresh: Sequence[Answer],
    ) -> bool:
        """Whether a batch without any answer is the infrastructure's doing.

        Of what has failed before, and is only tried once more, it takes many batches.
        """
        is_barren = bool(failures) and all(outcome.error is not None for _, outcome in batch)
        infrastructure = {self.verdict(outcome) for _, outcome in batch} <= INFRASTRUCTURE
        self.barren = self.barren + 1 if is_barren and infrastructure else 0
        if not is_barren or not (fresh or self.barren >= _BARREN_BATCHES):
            return False
        is_first = not self._successes and all(outcome.score is None for _, outcome in answers)
        several = _are_several(batch) and (self.barren or is_first)
        return bool(several or (self.barren and len(batch) >= self.many) or self.barren >= _BARREN_BATCHES)

    def _is_outage(self, run: Sequence[Answer], answers: Sequence[Answer]) -> bool:
        """Whether these failures in a row are too unlikely to be the configurations' own."""
        if not _are_several(run) and len(run) < self.many:
            return False
        judged = {id(outcome) for _, outcome in run}
        before = [answer for answer in answers if id(answer[1]) not in judged]
        successes = self._successes + Counter(row for row, o in before if o.score is not None)
        failures = self._errors + Counter(row for row, o in before if o.error is not None)
        likelihood = 1.0
        for row, times in Counter(row for row, _ in run).items():
            likelihood *= _chance(row, times, successes, failures)
        return likelihood < _OWN_FAULT


def last_failures(answers: Iterable[Answer]) -> list[Answer]:
    """Those after the last success, in the order in which they came back; skipped calls are no answers."""
    run: list[Answer] = []
    for row, outcome in sorted(answers, key=lambda answer: answer[1].order):
        if outcome.score is not None:
            run.clear()
        elif outcome.error is not None:
            run.append((row, outcome))
    return run


def _are_several(failures: Sequence[Answer]) -> bool:
    """Whether they are of more than one configuration, and of more than one example."""
    return len({row for row, _ in failures}) > 1 and len({outcome.example for _, outcome in failures}) > 1


def _chance(row: Row, times: int, successes: Counter[Row], failures: Counter[Row]) -> float:
    """Of ``times`` failures of ``row``, after these successes and failures of all."""
    if successes[row]:
        return float(((failures[row] + 1) / (successes[row] + failures[row] + 2)) ** times)
    if failures[row]:
        return 1.0
    known = successes.keys() | failures.keys()
    broken = sum(not successes[r] for r in known)
    return (broken + 1) / (len(known) + 2)


def _error(failures: Sequence[Answer]) -> BaseException:
    error = failures[0][1].error
    assert error is not None
    return error
