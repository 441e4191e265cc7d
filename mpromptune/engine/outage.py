r"""Tells an outage from broken candidates by the last failures.

A broken candidate fails on all its calls, while calls of other configurations succeed. In an outage all calls
fail, even those of configurations that succeeded before. So only the failures after the last success count,
in the order in which calls end. The search computes how likely these failures are if each configuration
failed independently of the others, as the product over their configurations of

    (f + 1) / (s + f + 2)       for each failure of a configuration with s successes and f failures before,
    (b + 1) / (n + 2)           once for a configuration without calls before, where b of the n
                                configurations known so far have failed on all their calls,
    1                           for one of these b configurations.

These are Laplace's rule of succession; a candidate that always fails is one event, not many.

Failures on an example that no configuration can answer, for instance because of a provider's filter, do not
count: at the end of a search these may be the only examples that configurations still lack.
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

# NOTE: likelihood below which failures count as an outage. It was reasoned, not tuned. With ten
# configurations that all succeeded before, it is an outage if two of them with ten successes each fail
# twice each (5e-5), or if three new ones fail (6e-4); it is none if two new ones fail (7e-3), or if one of
# the ten fails once together with a new one (7e-3).
_OWN_FAULT = 1e-3
# Number of consecutive small batches without an answer that counts as an outage.
_BARREN_BATCHES = 10

Answer = tuple[Row, Outcome]
# Returns the answers of all batches in flight, and their calls that have not ended.
AnswersInFlight = Callable[[], tuple[list[Answer], list[Future[Outcome]]]]


@dataclass
class Outage:
    """Judges every batch before it is told.

    Here a failure counts whether it is scored or not. A study does not save which scores were failures, so
    no plan may decide by this knowledge.

    Attributes:
        verdict: Returns the verdict on a failed outcome; None for one that was scored or skipped.
        many: Number of failures that counts as an outage even if all are of one configuration or example.
    """

    verdict: Callable[[Outcome], Verdict | None]
    many: int
    barren: int = 0  # consecutive batches in which all calls failed because of the infrastructure
    _successes: Counter[Row] = field(default_factory=Counter)
    _errors: Counter[Row] = field(default_factory=Counter)
    _failures: Failures = field(default_factory=Failures)

    def alarm(self, batch: Sequence[Answer], in_flight: AnswersInFlight) -> tuple[str, BaseException] | None:
        """The reason to stop the search, and its error; None if the batch may be told.

        Args:
            batch: The answers of the batch.
            in_flight: Returns the answers of all batches in flight.
        """
        answers, run = self._last_failures(batch, in_flight)
        failures = [answer for answer in run if not self._failures.is_unanswerable(answer[1].example)]
        if failures or not run:
            fresh = [(row, o) for row, o in failures if not self._failures.has_failed(row, o.example)]
            if self._is_barren(batch, answers, failures, fresh):
                return f"failures of all {len(batch)} calls of a batch", _error(failures)
            if fresh and self._is_outage(fresh, answers):
                return f"failures of the last {len(fresh)} calls", _error(fresh)
        self.note(batch)
        return None

    def note(self, batch: Iterable[Answer]) -> None:
        """Count successes and failures. A failure of an earlier run has neither a score nor an error."""
        for row, outcome in batch:
            is_answered, example = outcome.score is not None, {outcome.example}
            (self._successes if is_answered else self._errors)[row] += 1
            self._failures.note(row, *((example, set()) if is_answered else (set(), example)))

    def _last_failures(
        self, batch: Sequence[Answer], in_flight: AnswersInFlight
    ) -> tuple[list[Answer], list[Answer]]:
        """All answers in flight, and the failures since the last success if one of them is of this batch.

        It waits for calls of later batches, because a success among them would rule out an outage.
        """
        own = {id(outcome) for _, outcome in batch}
        while True:
            answers, pending = in_flight()
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
        """Whether a batch without any answer shows an outage.

        If all its calls repeat earlier failures, only many such batches do.
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
        """Whether these failures are too unlikely to be the fault of the configurations."""
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
    """The failures after the last success, in the order in which calls ended; skipped calls do not count."""
    run: list[Answer] = []
    for row, outcome in sorted(answers, key=lambda answer: answer[1].order):
        if outcome.score is not None:
            run.clear()
        elif outcome.error is not None:
            run.append((row, outcome))
    return run


def _are_several(failures: Sequence[Answer]) -> bool:
    """Whether they are of more than one configuration and of more than one example."""
    return len({row for row, _ in failures}) > 1 and len({outcome.example for _, outcome in failures}) > 1


def _chance(row: Row, times: int, successes: Counter[Row], failures: Counter[Row]) -> float:
    """Likelihood of ``times`` failures of ``row``, given the earlier successes and failures of all rows."""
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
