"""The plan of batches: explore by what is likely to be best, then confirm what that costs little."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.plan import Request, Task, best_so_far
from mpromptune.engine.scores import Examples, ScoreTable
from mpromptune.errors import InvalidArgumentError
from mpromptune.model.space import FloatArray, Row

# Whether winner and baseline end measured on all examples; "auto", where that costs little.
Confirm = bool | Literal["auto"]

# NOTE: most configurations are seen to be poor on five telling examples. Where several predictors are
# combined, every score tells something of the candidates of all, and more configurations are worth more:
# regret of 2.9 with three, 3.8 with five (three programs, 12 seeds, +-0.3).
_BLOCK_SIZE, _COMBINED = 5, 3
# NOTE: of all calls, what `confirm="auto"` may take beside exploring. The winner is mostly measured on three
# quarters of the examples when exploring ends.
_LITTLE = 0.2
# Posterior probability with which the winner is better than the baseline, after which it is not compared
# with it any further.
_SURE = 0.95
# NOTE: part of a full evaluation's standard error that counts as no gain. The validation set is itself a
# sample, so the winner's score is known to one standard error (2.8 points at 80 % of 200 examples). A gain of
# a tenth of it would widen that uncertainty, added in quadrature, by half a percent: nobody could tell it
# from the luck of the examples. It was reasoned, not tuned.
_NEGLIGIBLE = 0.1
# Failures in a batch that are read as an outage, though all of one configuration.
_OUTAGE = 10


class BatchPlan:
    """Batches of a few examples for each of several configurations until the budget is spent.

    A configuration has as many blocks in a batch as it wins; a block is ``block_size`` examples, the same
    for all that lack them, those early that tell the leaders apart.

    Args:
        task: What is to be searched, and for how many calls.
        table: The scores.
        batch_size: Blocks in a batch.
        block_size: Examples of a block.
        confirm: Whether winner and baseline end measured on all examples; "auto", where that costs little.
        target: A mean score that is good enough.
        patience: Batches in a row without a gain in sight after which to stop.

    Raises:
        InvalidArgumentError: A block does not fit into the validation set, or the budget is too low.
    """

    def __init__(
        self,
        task: Task,
        table: ScoreTable,
        batch_size: int | None = None,
        block_size: int | None = None,
        confirm: Confirm = "auto",
        target: float | None = None,
        patience: int | None = None,
    ) -> None:
        n_examples, usual = task.n_examples, _COMBINED if task.is_combined else _BLOCK_SIZE
        self.task, self._table, self._confirm = task, table, confirm
        self._size = min(usual, n_examples) if block_size is None else block_size
        self._check()
        self._max_calls = task.max_calls
        self.batch_size = batch_size or task.batch_size(self._size)
        self.batches_in_flight = task.batches_in_flight(self.batch_size * self._size)
        self.outage = min(_OUTAGE, n_examples)
        self.arguments: Mapping[str, Any] = {"block_size": self._size}
        self.measures_baseline = confirm is True
        self._target, self._patience = target, patience
        # A fixed order for all: what one configuration is measured on, another one is too.
        rng = np.random.default_rng([abs(task.seed), n_examples])
        self._uniform: FloatArray = -np.log(1.0 - rng.random(n_examples))
        self._price: Callable[[Row], float] = lambda row: 1.0
        self._judged = self._quiet = 0  # batches judged by `patience`, and those in a row that gained nothing
        self._over = False

    def _check(self) -> None:
        n_examples, max_calls = self.task.n_examples, self.task.max_calls
        if not 1 <= self._size <= n_examples:
            raise InvalidArgumentError(
                f"block_size must be between 1 and the {n_examples} validation examples; got {self._size}."
            )
        if self._confirm is True and max_calls < 2 * n_examples:
            raise InvalidArgumentError(
                f"max_calls={max_calls} is below the {2 * n_examples} calls that measuring the winner and "
                f"the baseline on all {n_examples} validation examples takes. Raise max_calls, use fewer "
                "validation examples, or pass confirm=False."
            )

    def is_open(self, row: Row) -> bool:
        """Whether measuring ``row`` further could matter: with ``confirm=True``, what can still win."""
        affordable = self._confirm is not True or self._left_beside([row]) >= 0
        return self._table.is_open(row) and affordable

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Lowers the budget; what is kept back for winner and baseline counts at their price."""
        self._max_calls, self._price = min(self.task.max_calls, calls), price

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` has a score on every example that can be answered, from however many trials."""
        return self._table.is_full(row)

    def next_batch(self, evidence: Evidence) -> Iterator[Request]:
        """A batch to explore with; once the calls for that are spent, what winner and baseline lack."""
        before, is_alone, baseline = self._table.asked_calls, not self._table.pending, self.task.baseline
        if not self._table.asked(baseline) and self._remaining > 0:
            yield Request(baseline, self._first)
        self._over = self._is_over(evidence)
        if not self._over:
            yield from self._explore(evidence, self._available(evidence))
        if self._table.asked_calls == before:
            yield from self._complete(evidence, is_alone)

    @property
    def first(self) -> Examples:
        """What the baseline is to be measured on first of all."""
        return self._first(self.task.baseline, 0)

    def _first(self, row: Row, number: int) -> Examples:
        """All where it is to be measured in full anyway: that tells how hard the examples are."""
        order = np.argsort(self._uniform, kind="stable").tolist()
        size = self.task.n_examples if self.measures_baseline else self._size
        return self._table.open_of(row, order)[: min(size, self._remaining)]

    # Exploring.

    @property
    def _remaining(self) -> int:
        """Calls not yet made or committed to."""
        return self._max_calls - self._table.asked_calls

    def _explore(self, evidence: Evidence, available: int) -> Iterator[Request]:
        until = self._table.asked_calls + available
        blocks = min(self.batch_size, math.ceil(available / self._size))
        for row, wanted in self._rows(evidence, blocks, available):
            left = until - self._table.asked_calls
            if left <= 0:  # trials of an earlier run may be longer than was planned for them now
                break
            if row is None or left >= self._price(row):
                yield Request(row, partial(self._next, evidence, wanted * self._size, left))

    def _next(self, evidence: Evidence, wanted: int, left: int, row: Row, number: int) -> Examples:
        limit = min(wanted, max(1, math.floor(left / max(1.0, self._price(row)))))
        return self._table.open_of(row, self._order(evidence, number))[:limit]

    def _rows(self, evidence: Evidence, blocks: int, available: int) -> Iterator[tuple[Row | None, int]]:
        """Configurations and the blocks that each has in the next batch."""
        if blocks <= 0:
            return
        if self.task.allocates:
            rng = np.random.default_rng([abs(self.task.seed), self._table.trials])
            calls = available + self._table.pending
            yield from Counter(evidence.propose(blocks, calls, self.is_open, rng)).items()
            return
        for _ in range(blocks):
            started = self._table.started
            if len(started) < self.task.space_size or any(map(self.is_open, started)):
                yield None, 1

    def _order(self, evidence: Evidence, number: int) -> list[int]:
        r"""All examples, those early that tell more: a weighted sample without replacement [Efraimidis2006]_.

        An example is placed by ``-log(u) / w``, with u uniform, and w the information of one more score of
        the leader. All configurations have the same u, so that they are compared on the same examples; but
        where many configurations are met once each, every trial has its own, so that all examples are met.
        So it does with a sampler that does not look at examples, and without weights: nobody would find out
        who is good at those that tell most and at nothing else.

        .. [Efraimidis2006] P. S. Efraimidis, P. G. Spirakis. Weighted random sampling with a reservoir.
            Information Processing Letters 97, 2006.
        """
        keys, allocates = self._uniform, self.task.allocates
        if evidence.is_additive or not allocates:
            rng = np.random.default_rng([abs(self.task.seed), number, 1])
            keys = -np.log(1.0 - rng.random(self.task.n_examples))
        information = evidence.information() if allocates else None
        keys = keys if information is None else keys / information
        return [int(example) for example in np.argsort(keys, kind="stable")]

    def _available(self, evidence: Evidence) -> int:
        """Calls to explore with; the rest is kept for winner and baseline."""
        leader, baseline = self._finalist(evidence), self.task.baseline
        lacking = self.task.n_examples - self._size
        if self._confirm is True:
            # The first block of a rival that nobody knows yet is part of what is kept for it.
            unknown = lacking * max([1.0, *map(self._price, self._table.started)])
            beside = [baseline] if leader is None else [baseline, leader]
            kept = self._cost(beside) + unknown * (leader is None) + self._dearer_in_flight()
            return math.floor(self._remaining - kept)
        if leader is None or not self._confirm:
            return self._remaining
        share = _LITTLE * self._max_calls
        if evidence.is_additive and lacking <= share:
            # For those that lead, to tell them apart by scores of their own.
            return math.floor(self._remaining - share)
        both = [] if self._is_sure(evidence, leader) else [leader, baseline]
        return self._remaining - (self._little(both) or self._little([leader]))

    def _cost(self, rows: Iterable[Row]) -> float:
        """What measuring ``rows`` on all that they lack takes, in average calls; nothing for dropped ones."""
        kept = [row for row in rows if not self._table.is_dropped(row)]
        return sum(len(self._table.missing(row)) * self._price(row) for row in kept)

    def _dearer_in_flight(self) -> float:
        """What the calls in flight will have cost above as many average ones."""
        table = self._table
        return sum(table.pending_of(row) * (self._price(row) - 1.0) for row in table.started)

    def _little(self, rows: Iterable[Row]) -> int:
        """What measuring ``rows`` in full costs, if that is little and can be paid; or else nothing."""
        cost = self._cost(rows)
        return math.ceil(cost) if cost <= min(_LITTLE * self._max_calls, self._remaining) else 0

    def _left_beside(self, rows: Sequence[Row]) -> float:
        """Calls left when these and the baseline are to end fully measured."""
        return self._remaining - self._cost({self.task.baseline, *rows})

    # Confirming.

    def _complete(self, evidence: Evidence, is_alone: bool) -> Iterator[Request]:
        """What the winner lacks, and the baseline as far as it takes to say which of the two is better.

        The winner is the best of what has been told; if it is another one when all has been, that is
        measured too, as far as calls are left.
        """
        leader = self._finalist(evidence)
        if self._confirm is True:
            yield from self._complete_both(evidence, leader, is_alone)
            return
        if not self._confirm or leader is None or self._has_target(evidence):
            return
        if evidence.is_additive and is_alone:
            leader = self._rival(evidence, leader) or leader
        if self._little([leader]):
            yield from self._rest_of(leader)
        if is_alone and not self._is_sure(evidence, leader):
            shared = sorted(self._table.asked(leader))
            limit = min(self._remaining, self.batch_size * self._size)
            if limit and self._table.open_of(self.task.baseline, shared):
                yield Request(self.task.baseline, lambda row, _: self._table.open_of(row, shared)[:limit])

    def _complete_both(self, evidence: Evidence, leader: Row | None, is_alone: bool) -> Iterator[Request]:
        """All that both lack; what failed for the baseline waits for a rival that may fail on it, too."""
        baseline, is_enough = self.task.baseline, self._has_target(evidence)
        rivals = [leader] if leader is not None and not is_enough else []
        if not is_alone:  # another one may lead yet, unless this one is well known
            rivals = [row for row in rivals if 2 * len(self._table.missing(row)) <= self.task.n_examples]
        waits = not (is_alone or is_enough or rivals) and self._table.has_tried_all(baseline)
        for row in dict.fromkeys(rivals if waits else [baseline, *rivals]):
            yield from self._rest_of(row)

    def _rest_of(self, row: Row) -> Iterator[Request]:
        """What ``row`` lacks, if that can be paid."""
        is_lacking = 0 < len(self._table.missing(row)) <= self._remaining
        if is_lacking and not self._table.is_dropped(row):
            yield Request(row, lambda row, number: self._table.missing(row))

    def _is_sure(self, evidence: Evidence, leader: Row) -> bool:
        """Whether it is known which is better, the leader or the baseline."""
        baseline = self.task.baseline
        return leader == baseline or evidence.chance_of_gain(leader, baseline) >= _SURE

    def _finalist(self, evidence: Evidence) -> Row | None:
        """Whom calls are kept back for: the leader, or with ``confirm=True`` the baseline's best rival.

        The baseline is measured in any case then, so its rival costs nothing that another could have.
        """
        has_rival = self._confirm is True and not self._over
        return self._leader(evidence, apart_from=self.task.baseline if has_rival else None)

    def _leader(self, evidence: Evidence, apart_from: Row | None = None) -> Row | None:
        """The highest posterior mean of what was measured; with ``confirm=True``, of what can still win."""
        rows = [row for row in self._table.rows if row != apart_from and not self._table.is_dropped(row)]
        if self._confirm is True:
            rows = [row for row in rows if self._left_beside([row]) >= 0]
        return evidence.best_first(rows)[0] if rows else None

    def _rival(self, evidence: Evidence, leader: Row) -> Row | None:
        """The best of those whose lacking examples can be paid, if it may be better than the leader."""
        table = self._table
        rows = [row for row in table.rows if 0 < len(table.missing(row)) <= self._remaining]
        best = next(iter(evidence.best_first([row for row in rows if not table.is_dropped(row)])), None)
        return best if best is not None and evidence.chance_of_gain(best, leader) > 1.0 - _SURE else None

    # Ending.

    def _is_over(self, evidence: Evidence) -> bool:
        """Whether the user's rules say stop, on what has been told; asked again after every batch."""
        if (self._target is None and self._patience is None) or not self._table.calls:
            return False
        leader = self._leader(evidence) or self.task.baseline
        if self._patience is not None and self._judged < self._table.batches:
            self._judged = self._table.batches
            gain = evidence.largest_gain(leader, lambda row: row != leader and self.is_open(row))
            is_nothing = gain < _NEGLIGIBLE * evidence.standard_error(self.task.n_examples)
            self._quiet = self._quiet + 1 if is_nothing else 0
        is_hopeless = self._patience is not None and self._quiet >= self._patience
        return is_hopeless or self._is_good_enough(leader, evidence)

    def _is_good_enough(self, leader: Row, evidence: Evidence) -> bool:
        """By the leader's posterior, until it is fully measured; by what was measured then."""
        if self._target is None or self._has_target(evidence):
            return self._target is not None
        return not self.is_full(leader) and float(evidence.posterior([leader])[0][0]) >= self._target

    def _has_target(self, evidence: Evidence) -> bool:
        """Whether what would be returned now is fully measured, and reaches the target."""
        if self._target is None:
            return False
        best = self._best_full(evidence.best_first(self._table.rows))
        return best is not None and self._table.mean(best) >= self._target

    def winner(self, ranked: Sequence[Row], is_cut_short: bool) -> Row:
        """The highest posterior mean; with ``confirm=True``, of what is fully measured.

        Not one that scores less than the baseline where both have all examples, or with ``confirm=True``
        on all that both have.
        """
        table, baseline = self._table, self.task.baseline
        if self._confirm is True:
            if is_cut_short:
                return best_so_far(table, ranked, baseline)
            best = self._best_full(ranked) or baseline
            is_worse = bool(table.means(baseline)) and not table.is_not_worse(best, baseline)
            return baseline if is_worse else best
        if not ranked:
            return baseline
        both_full = ranked[0] != baseline and table.is_full(ranked[0]) and table.is_full(baseline)
        return self._best_full(ranked) or ranked[0] if both_full else ranked[0]

    def _best_full(self, ranked: Sequence[Row]) -> Row | None:
        """The first that is fully measured, or the baseline where that measured better."""
        full = [row for row in ranked if self._table.is_full(row)]
        if self.task.baseline in full and not self._table.is_not_worse(full[0], self.task.baseline):
            return self.task.baseline
        return full[0] if full else None
