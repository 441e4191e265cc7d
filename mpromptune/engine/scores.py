"""The one table of scores: what was asked of which configuration, what came of it, and what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from mpromptune.execution.usage import Usage
from mpromptune.model.space import Row

Examples = tuple[int, ...]

# Trials of one configuration that may fail before it is given up, unless on few of its examples.
_FAILED_TRIALS = 3
# Trials of one configuration that have to fail on an example before it is not tried there again.
_TRIES = 2
# Configurations, answered elsewhere, that an example has to fail for before it is left out for everybody.
_WITNESSES = 2
# NOTE: part of the examples that a configuration may fail on, and yet be compared on the others. It was
# reasoned, not tuned: a filter or a time limit hits a few pairs in a hundred, and who fails on one of ten has
# a fault of its own.
_TOLERATED = 0.1


@dataclass
class Failures:
    """Which examples fail, and for whom.

    Attributes:
        answers: How often each example was answered.
        failing: For whom each example failed, and was not answered since.
        sound: The configurations that were answered on anything.
    """

    answers: Counter[int] = field(default_factory=Counter)
    failing: dict[int, set[Row]] = field(default_factory=dict)
    sound: set[Row] = field(default_factory=set)

    def note(self, row: Row, answered: AbstractSet[int], failed: AbstractSet[int]) -> None:
        """``row`` was answered on some examples, and failed on others."""
        if answered:
            self.sound.add(row)
        for example in answered:
            self.answers[example] += 1
            self.failing.get(example, set()).discard(row)
        for example in failed:
            self.failing.setdefault(example, set()).add(row)

    def has_failed(self, row: Row, example: int) -> bool:
        """Whether ``row`` failed on it, and was not answered since."""
        return row in self.failing.get(example, ())

    def is_unanswerable(self, example: int) -> bool:
        """Whether it fails for configurations that are fine, and for more than it is answered."""
        witnesses = len(self.failing.get(example, set()) & self.sound)
        return witnesses >= max(_WITNESSES, self.answers[example] + 1)


@dataclass
class _Arm:
    """What is known of one configuration; counters are by example."""

    scores: dict[int, list[float]] = field(default_factory=dict)
    means: dict[int, float] = field(default_factory=dict)  # of these, which are asked for more often
    pending: Counter[int] = field(default_factory=Counter)
    failures: Counter[int] = field(default_factory=Counter)  # since the last answer
    failed_trials: list[AbstractSet[int]] = field(default_factory=list)  # what each of them lacks
    usage: Usage = field(default_factory=Usage)

    @property
    def calls(self) -> int:
        return sum(map(len, self.scores.values()))

    @property
    def asked(self) -> AbstractSet[int]:
        return self.scores.keys() | self.pending.keys() if self.pending else self.scores.keys()


class ScoreTable:
    """Every call that was asked for and answered; plans decide by it, and keep no books of their own.

    It holds what a study keeps and nothing else, so that a run that goes on decides as one in one go.
    A configuration may be new at any time. An example that is scored again keeps all its answers.

    Args:
        n_examples: Size of the validation set.

    Attributes:
        calls: Program calls that gave a score.
        pending: Program calls under way.
        batches: Batches told.
        usage: What all trials have used, those that failed included.
        trials: Trials that have begun.
        whole: Configurations of trials on all examples, in the order in which they began.
    """

    def __init__(self, n_examples: int) -> None:
        self.n_examples = n_examples
        self.calls = self.pending = self.batches = self.trials = 0
        self.usage = Usage()
        self.whole: dict[Row, None] = {}
        self._arms: dict[Row, _Arm] = {}
        self._told: dict[Row, None] = {}  # in the order in which they were first told
        self._failures = Failures()
        self._unanswerable: frozenset[int] = frozenset()

    def start(self, row: Row, examples: Examples) -> None:
        """A trial of ``row`` on ``examples`` has begun."""
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
        """That trial has ended.

        Args:
            row: Its configuration.
            examples: What it was to be measured on.
            scores: Example to score; the others have failed.
            usage: What it used.
            refused: Of those scored, the examples on which the prompt was refused.
            is_over: False where another run is to go on with it: it was cut short, and has not failed.

        Returns:
            Examples that ``row`` has failed on again, and is not asked on any more.
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
        """A trial that has ended already; ``known`` as for `finish`."""
        self.start(row, examples)
        self.finish(row, examples, scores, **known)

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``: they ended an earlier run, and may have been mended since."""
        self._arms[row].failed_trials.clear()
        self._arms[row].failures.clear()

    # What was measured.

    @property
    def rows(self) -> list[Row]:
        """Configurations with any score, in the order in which they were first told."""
        return [row for row in self._told if self._arms[row].scores]

    @property
    def started(self) -> AbstractSet[Row]:
        """Configurations that were ever asked on anything."""
        return self._arms.keys()

    @property
    def unanswerable(self) -> frozenset[int]:
        """Examples that nobody is compared on."""
        return self._unanswerable

    def means(self, row: Row) -> dict[int, float]:
        """Example to the mean of its scores, in the order of the examples.

        An example that is refused whatever the prompt says nothing about who was refused.
        """
        if row not in self._arms:
            return {}
        means = self._arms[row].means
        refused = {example for example in self._unanswerable if self._failures.has_failed(row, example)}
        return {example: means[example] for example in sorted(means.keys() - refused)}

    def mean(self, row: Row) -> float:
        """Mean over the examples of the mean of each; not a number where there is no score."""
        means = list(self.means(row).values())
        return mean(means) if means else math.nan

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` has a score on every example that can be answered.

        It need not have those on which it failed again and again, as long as they are few.
        """
        if row not in self._arms:
            return False
        answered = self._arms[row].scores.keys()
        own = self._given_up(row) - self._unanswerable - answered
        is_whole = len(answered | self._unanswerable | own) == self.n_examples
        return is_whole and _are_few(len(own), len(answered))

    def is_not_worse(self, row: Row, baseline: Row) -> bool:
        """Whether ``row`` scores at least as well as ``baseline`` on what both were measured on."""
        ours, theirs = self.means(row), self.means(baseline)
        shared = ours.keys() & theirs.keys()
        return bool(shared) and sum(ours[e] for e in shared) >= sum(theirs[e] for e in shared)

    def relative_use(self, of: Callable[[Usage], float], row: Row) -> float:
        """How many times the mean use of a call one of ``row`` takes; 1 where that is not known."""
        arm = self._arms.get(row, _Arm())
        mean_use = of(self.usage) / max(self.calls, 1)
        return of(arm.usage) / arm.calls / mean_use if arm.calls and mean_use else 1.0

    # What is left to measure.

    @property
    def asked_calls(self) -> int:
        """Calls that gave a score or are under way; what failed costs none of the budget."""
        return self.calls + self.pending

    def asked(self, row: Row) -> AbstractSet[int]:
        """Examples that ``row`` is measured on, or being measured on."""
        return self._arms[row].asked if row in self._arms else frozenset()

    def pending_of(self, row: Row) -> int:
        """Calls of ``row`` under way."""
        return self._arms[row].pending.total() if row in self._arms else 0

    def open_of(self, row: Row, order: Iterable[int]) -> Examples:
        """The examples that ``row`` may be explored on, in order; those that failed before come last."""
        return self._lacking(row, order, self._unanswerable)

    def missing(self, row: Row) -> Examples:
        """The examples that a finalist still lacks, failed ones last.

        Of those left out, what it has not been asked on: a passing failure may be over.
        """
        return self._lacking(row, range(self.n_examples), self._unanswerable & self._lost(row))

    def has_tried_all(self, row: Row) -> bool:
        """Whether ``row`` lacks only examples that it has failed on."""
        return self._lost(row) >= set(self.missing(row))

    def is_open(self, row: Row) -> bool:
        """Whether ``row`` has examples left to be explored on."""
        return len(self._closed(row) | self._unanswerable) < self.n_examples and not self.is_dropped(row)

    def is_dropped(self, row: Row) -> bool:
        """Whether so many trials of ``row``, and examples, failed that no further call is risked on it."""
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
        """Examples that ``row`` is measured on, being measured on, or failed on often enough."""
        given_up = self._given_up(row)
        return self.asked(row) | given_up if given_up and self._lacks_few(row) else self.asked(row)

    def _lost(self, row: Row) -> AbstractSet[int]:
        """Examples without a score that ``row`` failed on."""
        if row not in self._arms:
            return frozenset()
        asked = self._arms[row].asked
        return {example for example in self._arms[row].failures if example not in asked}

    def _given_up(self, row: Row) -> AbstractSet[int]:
        """Examples that enough trials of ``row`` failed on."""
        failures = self._arms[row].failures if row in self._arms else {}
        return {example for example, times in failures.items() if times >= _TRIES}

    def _lacks_few(self, row: Row) -> bool:
        """Whether ``row`` fails on so few examples that it can be judged on the others."""
        return _are_few(len(self._lost(row) - self._unanswerable), len(self.asked(row)))


def _are_few(lost: int, answered: int) -> bool:
    return lost <= _TOLERATED * (lost + answered)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; of numbers whose sum overflows, too."""
    total = sum(values)
    if math.isfinite(total):
        return total / len(values)
    largest = max(map(abs, values))
    return largest * (sum(value / largest for value in values) / len(values))
