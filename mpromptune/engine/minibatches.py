"""The plan of DSPy's MIPROv2: random minibatches, and at intervals the best one so far in full."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Offer
from mpromptune.engine.plan import Request, Task, best_so_far
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import InvalidArgumentError, require_count
from mpromptune.model.space import Examples, Row


@dataclass(frozen=True)
class Minibatches:
    """The arguments of DSPy's MIPROv2 for minibatches.

    Attributes:
        minibatch_size: Examples of a trial.
        minibatch_full_eval_steps: Number of trials between two full evaluations.
        minibatch: False if every trial is a full evaluation.
    """

    minibatch_size: int = 35
    minibatch_full_eval_steps: int = 5
    minibatch: bool = True

    def within(self, n_examples: int) -> Minibatches:
        """The arguments for a validation set; a minibatch of all examples counts as a full evaluation.

        Raises:
            InvalidArgumentError: A number is out of range.
        """
        require_count("minibatch_full_eval_steps", self.minibatch_full_eval_steps)
        if not self.minibatch or require_count("minibatch_size", self.minibatch_size) == n_examples:
            return Minibatches(n_examples, self.minibatch_full_eval_steps, minibatch=False)
        if self.minibatch_size > n_examples:
            raise InvalidArgumentError(
                f"minibatch_size={self.minibatch_size} exceeds the {n_examples} validation examples. Pass at "
                "most as many, or minibatch=False."
            )
        return self

    def calls(self, num_trials: int, n_examples: int) -> int:
        """Number of calls of ``num_trials`` trials, with the baseline and the full evaluations."""
        return stock_calls(num_trials, n_examples, **asdict(self))

    def trials_for(self, max_calls: int, n_examples: int) -> int:
        """The largest number of trials that ``max_calls`` calls allow.

        Raises:
            InvalidArgumentError: They do not allow a single trial.
        """
        if max_calls < (least := self.calls(1, n_examples)):
            raise InvalidArgumentError(
                f"max_calls={max_calls} is below the {least} calls of MIPROv2's shortest plan: the baseline "
                f"on all {n_examples} validation examples, one trial, and a full evaluation of it."
            )
        # Every trial costs at least one call, so there are at most as many trials as calls.
        return bisect_right(range(max_calls + 1), max_calls, key=lambda n: self.calls(n, n_examples)) - 1


def stock_calls(
    num_trials: int,
    n_examples: int,
    minibatch: bool = True,
    minibatch_size: int = 35,
    minibatch_full_eval_steps: int = 5,
) -> int:
    """Program calls that DSPy's MIPROv2 spends in its search step for these arguments.

    It evaluates the default program, then every trial on a minibatch, and after every
    ``minibatch_full_eval_steps`` of them (and at the end) the best one so far on all examples.
    """
    per_trial = min(minibatch_size, n_examples) if minibatch else n_examples
    full = math.ceil(num_trials / minibatch_full_eval_steps) if minibatch else 0
    return n_examples * (1 + full) + per_trial * num_trials


class MiproPlan:
    """Evaluates the baseline in full, then trials on random minibatches, q at a time.

    After every ``minibatch_full_eval_steps`` trials, and after the last, the configuration with the highest
    mean among those without a full evaluation gets one. It is chosen when all earlier trials have been told;
    the next batch starts after the choice and runs at the same time as the full evaluation. A configuration
    with a full evaluation is not proposed again. Pairs of configuration and example that were measured before
    are paid for again, as in DSPy.

    Args:
        task: The search problem; its budget sets the number of trials.
        table: The scores.
        batch_size: Trials in a batch.
        minibatches: DSPy's arguments.

    Raises:
        InvalidArgumentError: A number is out of range.
    """

    measures_baseline: bool = False  # the first trial does that anyway
    batches_in_flight: int = 2

    def __init__(
        self,
        task: Task,
        table: ScoreTable,
        batch_size: int | None = None,
        minibatches: Minibatches | None = None,
    ) -> None:
        self.task, self._table = task, table
        self._batches = (minibatches or Minibatches()).within(task.n_examples)
        self._planned = self._num_trials = self._batches.trials_for(task.max_calls, task.n_examples)
        self.batch_size = batch_size or task.batch_size(self._batches.minibatch_size)
        self.outage = task.n_examples  # a repeated full evaluation may fail again without an outage
        self.arguments: Mapping[str, Any] = {
            "minibatch_size": self._batches.minibatch_size,
            "minibatch_full_eval_steps": self._batches.minibatch_full_eval_steps,
        }
        self._steps = self._batches.minibatch_full_eval_steps if self._batches.minibatch else self._num_trials
        self._asked = 0  # trials on minibatches
        self._decided = 0  # choices of a configuration for a full evaluation
        self._chosen = [task.baseline]  # configurations chosen for full evaluations

    @property
    def first(self) -> Examples:
        """All examples."""
        return tuple(range(self.task.n_examples))

    def is_open(self, row: Row) -> bool:
        """Whether ``row`` could still be chosen for a full evaluation."""
        return row not in self._chosen and row not in self._table.whole and not self._table.is_dropped(row)

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Shorten the plan; trials that have been asked are still followed by a full evaluation."""
        n_examples = self.task.n_examples
        least = self._batches.calls(1, n_examples)
        affordable = self._batches.trials_for(calls, n_examples) if calls >= least else 0
        self._num_trials = max(self._asked, min(self._planned, affordable))

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` has had a full evaluation; minibatches that cover all examples do not count."""
        return row in self._table.whole and not self._table.pending_of(row) and self._table.is_full(row)

    def next_batch(self, evidence: Evidence) -> Iterator[Request]:
        """Yield the full evaluations that are due; if there are none, trials on minibatches."""
        # An earlier run may have spent more than planned.
        if not self._is_affordable(self._batches.minibatch_size):
            self._num_trials = min(self._num_trials, self._asked)
        is_left = self._decided * self._steps < self._num_trials
        if is_left and self._asked >= self._boundary():
            if self._table.pending:  # the choice needs the scores of all earlier trials
                return
            self._decide()
        owed = dict.fromkeys([*self._table.whole, *self._chosen])
        due = [row for row in owed if not self._table.pending_of(row) and self._lacking(row)]
        for row in due:
            yield Request(row, lambda row, number: self._lacking(row))
        if not due:
            yield from self._explore(evidence)

    def _lacking(self, row: Row) -> Examples:
        """Examples that the full evaluation of ``row`` lacks; none if its trials failed too often."""
        if row not in self._table.whole:
            return self.first
        return () if self._table.is_dropped(row) else self._table.missing(row)

    def _explore(self, evidence: Evidence) -> Iterator[Request]:
        for _ in range(min(self.batch_size, self._boundary() - self._asked)):
            closed = {*self._table.whole, *self._chosen, *filter(self._table.is_dropped, self._table.started)}
            if len(closed) >= self.task.space_size or not self._is_affordable(self._batches.minibatch_size):
                return
            self._asked += 1
            yield Request(self._proposed(evidence) if self.task.allocates else None, self._minibatch)

    def _proposed(self, evidence: Evidence) -> Row | Offer | None:
        rng = np.random.default_rng([abs(self.task.seed), self._asked])
        rows = evidence.propose(1, self.task.max_calls - self._table.asked_calls, self.is_open, rng)
        return rows[0] if rows else None

    def _minibatch(self, row: Row, number: int) -> Examples:
        # The last entry makes this stream differ from others that are seeded by (seed, trial number).
        n_examples = self.task.n_examples
        rng = np.random.default_rng([abs(self.task.seed), number, n_examples])
        drawn = rng.choice(n_examples, self._batches.minibatch_size, replace=False)
        return tuple(sorted(int(example) for example in drawn))

    def _is_affordable(self, calls: int) -> bool:
        """Whether the budget allows these calls and, with minibatches, a full evaluation after them."""
        follows = self.task.n_examples if self._batches.minibatch else 0
        return self._table.asked_calls + calls + follows <= self.task.max_calls

    def _boundary(self) -> int:
        """Number of trials on minibatches after which the next full evaluation is due."""
        return min((self._decided + 1) * self._steps, self._num_trials)

    def _decide(self) -> None:
        self._decided += 1
        lacking = [row for row in self._table.rows if self.is_open(row)]
        if lacking and self._is_affordable(0):
            self._chosen.append(max(lacking, key=self._table.mean))

    def winner(self, ranked: Sequence[Row], is_cut_short: bool) -> Row:
        """The configuration with the best full evaluation; of equal ones the earliest, the baseline first.

        Configurations with a lower score than the baseline on the examples that both have are skipped.
        """
        baseline = self.task.baseline
        full = [row for row in self._table.whole if self.is_full(row)]
        if is_cut_short and not set(full) - {baseline}:
            return best_so_far(self._table, ranked, baseline)
        rivals = [row for row in full if self._table.is_not_worse(row, baseline)]
        return max(rivals, key=self._table.mean, default=baseline)
