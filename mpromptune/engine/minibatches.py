"""The plan of DSPy's MIPROv2: random minibatches, and now and then the best one so far in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.pairs import MAX_FAILURES
from mpromptune.engine.plan import Request
from mpromptune.engine.schedule import Minibatches
from mpromptune.execution.refusals import are_few
from mpromptune.model.space import Row
from mpromptune.storage.ledger import Examples, Ledger


@dataclass
class MiproPlan:
    """The baseline in full; then trials on minibatches of their own, q at a time.

    After every ``full_eval_steps`` trials, and after the last, the configuration with the highest
    mean that has no full evaluation yet gets one. It is chosen when all trials before it have been
    told, so the next round overlaps with it, not with the choice. What has a full evaluation is not
    proposed again; pairs that were measured before are paid for again, as in DSPy.

    Attributes:
        n_examples: Size of the validation set.
        max_calls: Budget of program calls; the plan is as long as it allows.
        baseline: The configuration that is fully evaluated first.
        space_size: Number of configurations.
        batch_size: Trials at a time.
        minibatches: DSPy's own arguments.
        seed: Fixes the minibatches, together with the trial's number.
        allocates: Whether the plan chooses the configurations by what is known; otherwise a sampler does.
    """

    n_examples: int
    max_calls: int
    baseline: Row
    space_size: int
    batch_size: int
    minibatches: Minibatches
    seed: int
    allocates: bool = False
    failures: Counter[Row] = field(default_factory=Counter)
    rounds_in_flight: int = 2
    _asked: int = 0  # trials on minibatches
    _decided: int = 0  # full evaluations of their best
    _spent: int = 0  # calls made or committed to

    def __post_init__(self) -> None:
        self.outage = self.n_examples  # what a full evaluation lacks may fail again, and yet be its own fault
        self.num_trials = self._planned = self.minibatches.trials_for(self.max_calls, self.n_examples)
        self._steps = self.minibatches.full_eval_steps if self.minibatches.enabled else self.num_trials
        self._full: dict[Row, None] = {}  # in the order in which they were completed
        # Full evaluations decided on or running: the examples that are still to be answered.
        self._owed: dict[Row, Examples] = {self.baseline: tuple(range(self.n_examples))}
        self._running: set[Row] = set()  # of these

    def is_open(self, row: Row) -> bool:
        """Whether ``row`` could still be chosen for a full evaluation."""
        return row not in self._full and row not in self._owed and not self.is_dropped(row)

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Shortens the plan; what has been asked still ends with a full evaluation of its best."""
        least = self.minibatches.calls(1, self.n_examples)
        affordable = self.minibatches.trials_for(calls, self.n_examples) if calls >= least else 0
        self.num_trials = max(self._asked, min(self._planned, affordable))

    def is_dropped(self, row: Row) -> bool:
        """Whether ``row`` has failed too often."""
        return self.failures[row] >= MAX_FAILURES

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``."""
        del self.failures[row]

    def is_stuck(self, ledger: Ledger) -> bool:
        """Whether the baseline has failed too often: nothing comes before its full evaluation."""
        return self.is_dropped(self.baseline) and self.baseline not in self._full

    def is_full(self, row: Row, ledger: Ledger) -> bool:
        """Whether ``row`` has had a full evaluation; minibatches that add up to one do not count."""
        return row in self._full

    def next_round(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """Full evaluations that are due, or the minibatches up to the next one."""
        if not self._is_affordable(self.minibatches.size):  # an earlier run may have spent more than planned
            self.num_trials = min(self.num_trials, self._asked)
        if self._is_due():
            if not alone:
                return
            self._decide(known.ledger)
        due = [row for row in self._owed if row not in self._running]
        for row in due:
            yield Request(row, lambda row, number: self._owed.get(row, ()))
        if not due:
            yield from self._explore(known)

    def _explore(self, known: Knowledge) -> Iterator[Request]:
        for _ in range(min(self.batch_size, self._boundary() - self._asked)):
            closed = {*self._full, *self._owed, *filter(self.is_dropped, self.failures)}
            if len(closed) >= self.space_size:
                return
            if not self._is_affordable(self.minibatches.size):
                return
            self._asked += 1
            yield Request(self._chosen(known) if self.allocates else None, self._minibatch)

    def _chosen(self, known: Knowledge) -> Row | None:
        rng = np.random.default_rng([abs(self.seed), self._asked])
        rows = known.propose(1, self.max_calls - self._spent, self.is_open, {}, rng)
        return rows[0] if rows else None

    def _minibatch(self, row: Row, number: int) -> Examples:
        # The last entry tells this stream from the others that start from (seed, trial number).
        rng = np.random.default_rng([abs(self.seed), number, self.n_examples])
        drawn = rng.choice(self.n_examples, self.minibatches.size, replace=False)
        return tuple(sorted(int(example) for example in drawn))

    def _is_affordable(self, calls: int) -> bool:
        """Whether the budget holds these calls, and after a minibatch the full evaluation that follows."""
        follows = self.n_examples if self.minibatches.enabled else 0
        return self._spent + calls + follows <= self.max_calls

    def _boundary(self) -> int:
        """Trials before the next full evaluation."""
        return min((self._decided + 1) * self._steps, self.num_trials)

    def _is_due(self) -> bool:
        left = self._decided * self._steps < self.num_trials
        return left and self._asked >= self._boundary()

    def _decide(self, ledger: Ledger) -> None:
        self._decided += 1
        lacking = [row for row in ledger.rows() if self.is_open(row)]
        if lacking and self._is_affordable(0):
            self._owed[max(lacking, key=ledger.mean)] = tuple(range(self.n_examples))

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Notes full evaluations; the number of minibatches follows from the budget."""
        self._spent += len(examples)
        if len(examples) == self.n_examples:
            self._owed[row] = tuple(examples)
        if self._owed.get(row) == tuple(examples):
            self._running.add(row)

    def settle(self, row: Row, examples: Sequence[int], lost: Iterable[int]) -> None:
        """A full evaluation is done once every example of it has been answered, or a few given up."""
        missing = tuple(lost)
        self._spent -= len(missing)
        self.failures[row] += bool(missing)
        if self._owed.get(row) != tuple(examples):
            return
        self._running.discard(row)
        del self._owed[row]
        lacks_few = self.is_dropped(row) and are_few(len(missing), self.n_examples - len(missing))
        if not missing or lacks_few:
            self._full[row] = None
        elif row == self.baseline or not self.is_dropped(row):
            self._owed[row] = missing

    def winner(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The best full evaluation; of equal ones the earliest, which favours the baseline.

        Where some lack examples, whatever is worse than the baseline on what both have is passed over.
        """
        rivals = [row for row in self._full if ledger.is_not_worse(row, self.baseline)]
        return max(rivals, key=ledger.mean, default=self.baseline)

    def best_so_far(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The best full evaluation, if any but the baseline's has been made."""
        if self._full.keys() - {self.baseline}:
            return self.winner(ranked, ledger)
        return ledger.best_so_far(ranked, self.baseline, self.n_examples)
