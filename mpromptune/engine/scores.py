"""The table of scores: all trials of each configuration, with their scores, failures and usage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from mpromptune.execution.usage import Usage
from mpromptune.model.space import Examples, Row

# Number of failed trials after which a configuration is dropped, unless it fails on few examples.
_FAILED_TRIALS = 3
# Number of failed trials on an example after which a configuration is not measured on it again.
_TRIES = 2
# Number of configurations with successes elsewhere that must fail on an example before it is excluded.
_WITNESSES = 2
# NOTE: fraction of examples on which a configuration may fail and still be compared on the others. It was
# reasoned, not tuned: a filter or a timeout affects a few pairs in a hundred; a configuration that fails on
# one example in ten is faulty.
_TOLERATED = 0.1


@dataclass
class Failures:
    """The successes and failures on each example.

    Attributes:
        answers: Number of successes on each example.
        failing: The configurations that failed on each example, without a success since.
        sound: The configurations with any success.
    """

    answers: Counter[int] = field(default_factory=Counter)
    failing: dict[int, set[Row]] = field(default_factory=dict)
    sound: set[Row] = field(default_factory=set)

    def note(self, row: Row, answered: AbstractSet[int], failed: AbstractSet[int]) -> None:
        """Add the successes and failures of a trial of ``row``."""
        if answered:
            self.sound.add(row)
        for example in answered:
            self.answers[example] += 1
            self.failing.get(example, set()).discard(row)
        for example in failed:
            self.failing.setdefault(example, set()).add(row)

    def has_failed(self, row: Row, example: int) -> bool:
        """Whether ``row`` failed on ``example`` without a success since."""
        return row in self.failing.get(example, ())

    def is_unanswerable(self, example: int) -> bool:
        """Whether several sound configurations fail on ``example``, and more fail than succeed."""
        witnesses = len(self.failing.get(example, set()) & self.sound)
        return witnesses >= max(_WITNESSES, self.answers[example] + 1)


@dataclass
class _Arm:
    """The trials of one configuration; counters are by example."""

    scores: dict[int, list[float]] = field(default_factory=dict)
    means: dict[int, float] = field(default_factory=dict)  # means of `scores`, which are needed more often
    pending: Counter[int] = field(default_factory=Counter)
    failures: Counter[int] = field(default_factory=Counter)  # since the last success
    failed_trials: list[AbstractSet[int]] = field(default_factory=list)  # the examples that each lacks
    usage: Usage = field(default_factory=Usage)

    @property
    def calls(self) -> int:
        return sum(map(len, self.scores.values()))

    @property
    def asked(self) -> AbstractSet[int]:
        return self.scores.keys() | self.pending.keys() if self.pending else self.scores.keys()


class ScoreTable:
    """All calls that were asked for, and their scores; plans decide by it and count nothing themselves.

    It contains only what the study saves, so that a continued search decides as an uninterrupted one.
    Configurations are added when they are first asked. A pair that is measured again keeps all its scores.

    Args:
        n_examples: Size of the validation set.

    Attributes:
        calls: Program calls that gave a score.
        pending: Program calls of open trials, and requests of their proposals.
        proposal_calls: Requests of proposals that have ended, which count like program calls.
        proposal_usage: Usage of the proposals that have ended.
        batches: Batches told.
        usage: Usage of all trials, including failed ones.
        trials: Number of trials begun.
        whole: Configurations that have had a trial on all examples, in the order in which these began.
    """

    def __init__(self, n_examples: int) -> None:
        self.n_examples = n_examples
        self.calls = self.pending = self.proposal_calls = self.batches = self.trials = 0
        self.usage = self.proposal_usage = Usage()
        self.whole: dict[Row, None] = {}
        self._arms: dict[Row, _Arm] = {}
        self._told: dict[Row, None] = {}  # configurations in the order in which they were first told
        self._failures = Failures()
        self._unanswerable: frozenset[int] = frozenset()

    def start(self, row: Row, examples: Examples) -> None:
        """Add an open trial of ``row`` on ``examples``."""
        self._arms.setdefault(row, _Arm()).pending.update(examples)
        self.pending += len(examples)
        self.trials += 1
        if len(examples) == self.n_examples:
            self.whole.setdefault(row)

    def finish(
        self,
        row: Row,
        examples: Examples,
        scores: Mapping[int, float],
        usage: Usage | None = None,
        refused: AbstractSet[int] = frozenset(),
        is_over: bool = True,
    ) -> AbstractSet[int]:
        """Record the end of a trial.

        Args:
            row: Its configuration.
            examples: The examples that it was asked on.
            scores: Example to score; the other examples have failed.
            usage: Its usage.
            refused: The scored examples on which the prompt was refused.
            is_over: False if it was cut short and the next run continues it; it has not failed then.

        Returns:
            Examples on which ``row`` has failed again, so that it is not measured on them any more.
        """
        arm = self._arms[row]
        arm.pending -= Counter(examples)
        self.pending -= len(examples)
        self._told.setdefault(row)
        for example, score in scores.items():
            arm.scores.setdefault(example, []).append(score)
            arm.means[example] = mean(arm.scores[example])
        lost = set(examples) - scores.keys() if is_over else set()
        self._failures.note(row, scores.keys() - refused, lost | refused)
        for example in scores.keys() - refused:
            arm.failures.pop(example, None)
        arm.failures.update(lost | refused)
        self.calls += len(scores)
        if usage is not None:
            arm.usage, self.usage = arm.usage + usage, self.usage + usage
        if lost:
            arm.failed_trials.append(lost)
        # Examples that may have become unanswerable by this trial, or may be answerable again.
        changed = {*examples, *arm.failures}
        self._unanswerable -= changed
        self._unanswerable |= set(filter(self._failures.is_unanswerable, changed))
        return lost & self._given_up(row)

    def add(self, row: Row, examples: Examples, scores: Mapping[int, float], **known: Any) -> None:
        """Add a trial that has ended; ``known`` are the keyword arguments of `finish`."""
        self.start(row, examples)
        self.finish(row, examples, scores, **known)

    def forgive(self, row: Row) -> None:
        """Clear the failed trials of ``row``: they ended an earlier run, and the cause may be gone."""
        self._arms[row].failed_trials.clear()
        self._arms[row].failures.clear()

    # What was measured.

    @property
    def rows(self) -> list[Row]:
        """Configurations with at least one score, in the order in which they were first told."""
        return [row for row in self._told if self._arms[row].scores]

    @property
    def started(self) -> AbstractSet[Row]:
        """Configurations with at least one trial, open or ended."""
        return self._arms.keys()

    @property
    def unanswerable(self) -> frozenset[int]:
        """The examples excluded from comparisons because no configuration can answer them."""
        return self._unanswerable

    def means(self, row: Row) -> dict[int, float]:
        """The mean score of ``row`` on each example, in the order of the examples.

        A score for a refusal does not count on an example that is refused for any prompt.
        """
        if row not in self._arms:
            return {}
        means = self._arms[row].means
        refused = {example for example in self._unanswerable if self._failures.has_failed(row, example)}
        return {example: means[example] for example in sorted(means.keys() - refused)}

    def mean(self, row: Row) -> float:
        """Mean score of ``row``, each example counting once; NaN if it has no score."""
        means = list(self.means(row).values())
        return mean(means) if means else math.nan

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` has a score on every example that can be answered.

        A few examples on which it failed repeatedly may be missing.
        """
        if row not in self._arms:
            return False
        answered = self._arms[row].scores.keys()
        own = self._given_up(row) - self._unanswerable - answered
        is_whole = len(answered | self._unanswerable | own) == self.n_examples
        return is_whole and _are_few(len(own), len(answered))

    def is_not_worse(self, row: Row, baseline: Row) -> bool:
        """Whether ``row`` scores at least as well as ``baseline`` on the examples that both have."""
        ours, theirs = self.means(row), self.means(baseline)
        shared = ours.keys() & theirs.keys()
        return bool(shared) and sum(ours[e] for e in shared) >= sum(theirs[e] for e in shared)

    def relative_use(self, of: Callable[[Usage], float], row: Row) -> float:
        """Mean use of a call of ``row`` divided by that of all calls; 1 if it is not known."""
        arm = self._arms.get(row, _Arm())
        mean_use = of(self.usage) / max(self.calls, 1)
        return of(arm.usage) / arm.calls / mean_use if arm.calls and mean_use else 1.0

    # What is left to measure.

    @property
    def asked_calls(self) -> int:
        """Calls that gave a score or are pending, and proposals; failed calls do not count."""
        return self.calls + self.pending + self.proposal_calls

    def asked(self, row: Row) -> AbstractSet[int]:
        """Examples on which ``row`` has a score or a pending call."""
        return self._arms[row].asked if row in self._arms else frozenset()

    def pending_of(self, row: Row) -> int:
        """Number of pending calls of ``row``."""
        return self._arms[row].pending.total() if row in self._arms else 0

    def open_of(self, row: Row, order: Iterable[int]) -> Examples:
        """The examples that ``row`` may be measured on, in the given order but failed ones last."""
        return self._lacking(row, order, self._unanswerable)

    def missing(self, row: Row) -> Examples:
        """The examples that ``row`` lacks for a full score, failed ones last.

        Excluded examples are among them until ``row`` fails on them: their failures may have been temporary.
        """
        return self._lacking(row, range(self.n_examples), self._unanswerable & self._lost(row))

    def has_tried_all(self, row: Row) -> bool:
        """Whether ``row`` lacks only examples that it has failed on."""
        return self._lost(row) >= set(self.missing(row))

    def is_open(self, row: Row) -> bool:
        """Whether ``row`` may be measured on further examples."""
        return len(self._closed(row) | self._unanswerable) < self.n_examples and not self.is_dropped(row)

    def is_dropped(self, row: Row) -> bool:
        """Whether ``row`` is not measured any more because too many of its trials and examples failed."""
        if row not in self._arms:
            return False
        failed = sum(not lost <= self._unanswerable for lost in self._arms[row].failed_trials)
        return failed >= _FAILED_TRIALS and not self._lacks_few(row)

    def _lacking(self, row: Row, order: Iterable[int], without: AbstractSet[int]) -> Examples:
        closed = self._closed(row) | without
        if len(closed) == self.n_examples:
            return ()
        last = self._lost(row) | self._unanswerable
        return tuple(sorted((e for e in order if e not in closed), key=last.__contains__))

    def _closed(self, row: Row) -> AbstractSet[int]:
        """Examples on which ``row`` has a score or a pending call, or failed too often."""
        given_up = self._given_up(row)
        return self.asked(row) | given_up if given_up and self._lacks_few(row) else self.asked(row)

    def _lost(self, row: Row) -> AbstractSet[int]:
        """Examples on which ``row`` failed and has neither a score nor a pending call."""
        if row not in self._arms:
            return frozenset()
        asked = self._arms[row].asked
        return {example for example in self._arms[row].failures if example not in asked}

    def _given_up(self, row: Row) -> AbstractSet[int]:
        """Examples on which ``row`` failed too often to be measured again."""
        failures = self._arms[row].failures if row in self._arms else {}
        return {example for example, times in failures.items() if times >= _TRIES}

    def _lacks_few(self, row: Row) -> bool:
        """Whether ``row`` fails on so few examples that it can be compared on the others."""
        return _are_few(len(self._lost(row) - self._unanswerable), len(self.asked(row)))


def _are_few(lost: int, answered: int) -> bool:
    return lost <= _TOLERATED * (lost + answered)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, also of numbers whose sum overflows."""
    total = sum(values)
    if math.isfinite(total):
        return total / len(values)
    largest = max(map(abs, values))
    return largest * (sum(value / largest for value in values) / len(values))
