"""The plan of batches: explore the configurations likely to be best, then measure the finalists in full."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Offer
from mpromptune.engine.order import ExampleOrder
from mpromptune.engine.plan import Request, Task, best_so_far
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import InvalidArgumentError
from mpromptune.model.space import Examples, Row

# Whether the winner and the baseline are measured on all examples in the end; "auto": if that costs little.
Confirm = bool | Literal["auto"]

# NOTE: five informative examples are enough to recognise most poor configurations. Where configurations
# combine several predictors, every score is informative for all their candidates, so trying more
# configurations pays: regret 2.9 with blocks of three, 3.8 with five (three programs, 12 seeds, +-0.3).
_BLOCK_SIZE, _COMBINED = 5, 3
# NOTE: the share of all calls that `confirm="auto"` may use for confirming. When exploring ends, the winner
# has usually been measured on three quarters of the examples.
_CONFIRM_SHARE = 0.2
# Posterior probability that the winner is better than the baseline above which the comparison ends.
_SURE = 0.95
# NOTE: the fraction of a full evaluation's standard error that counts as no gain. The validation set is
# itself a sample, so the winner's score is known to one standard error (2.8 points at 80 % of 200 examples).
# A gain of a tenth of it would widen that uncertainty, added in quadrature, by half a percent: it cannot be
# told from the random choice of examples. The value follows from this argument; it was not tuned.
_NEGLIGIBLE = 0.1
# NOTE: examples that a configuration needs scores on to win, and calls that must be left for a new candidate.
# A prompt that favours one label looks good if most of its first examples have that label. The model cannot
# see this: to it, examples differ only in difficulty. Elsewhere the rule costs nothing: on the five tables of
# single scores, with 775 calls and 156 prompts, mean regret is 1.72 with 20 examples and 1.77 with 5 (80
# seeds). For a new candidate, with 100, a full evaluation, scripted programs are 4 points worse.
_LEAST = 20
# Number of failures in a batch that counts as an outage even if all are of one configuration.
_OUTAGE = 10


class BatchPlan:
    """Measures batches of several configurations on a few examples each until the budget is spent.

    The allocation decides how many blocks of a batch a configuration gets. A block is ``block_size``
    examples. All configurations take the examples in one order, which begins with those that best
    distinguish the leaders.

    Args:
        task: What is searched, and for how many calls.
        table: The scores.
        batch_size: Blocks in a batch.
        block_size: Examples in a block.
        confirm: Whether the winner and the baseline are measured on all examples in the end; "auto": if
            that costs little.
        target: A mean score that is good enough.
        patience: Number of consecutive batches without an expected gain after which to stop.

    Raises:
        InvalidArgumentError: A block is larger than the validation set, or the budget is too low.
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
        self._order = ExampleOrder(task)
        self._price: Callable[[Row], float] = lambda row: 1.0
        self._judged = self._quiet = 0  # batches judged by `patience`; consecutive ones without a gain
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
        """Whether ``row`` may be measured further; with ``confirm=True``, only if it can still win."""
        affordable = self._confirm is not True or self._left_after([row]) >= 0
        return self._table.is_open(row) and affordable

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Lower the budget, and set the prices of the calls kept back for the winner and the baseline."""
        self._max_calls, self._price = min(self.task.max_calls, calls), price

    def is_full(self, row: Row) -> bool:
        """See `ScoreTable.is_full`."""
        return self._table.is_full(row)

    def next_batch(self, evidence: Evidence) -> Iterator[Request]:
        """Yield a batch that explores; when no calls are left for that, one that confirms the winner."""
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
        """The examples of the baseline's first trial."""
        return self._first(self.task.baseline, 0)

    def _first(self, row: Row, number: int) -> Examples:
        """A block; all examples if the baseline is measured in full anyway: it shows how hard they are."""
        size = self.task.n_examples if self.measures_baseline else self._size
        return self._table.open_of(row, self._order.first())[: min(size, self._remaining)]

    # Exploring.

    @property
    def _remaining(self) -> int:
        """Calls of the budget that have not been asked for."""
        return self._max_calls - self._table.asked_calls

    def _explore(self, evidence: Evidence, available: int) -> Iterator[Request]:
        until = self._table.asked_calls + available
        blocks = min(self.batch_size, math.ceil(available / self._size))
        for row, wanted in self._rows(evidence, blocks, available):
            left = until - self._table.asked_calls
            if left <= 0:  # trials from the record of an earlier run may be longer than planned here
                break
            left -= row.calls if isinstance(row, Offer) else 0
            if row is None or left >= (1 if isinstance(row, Offer) else self._price(row)):
                yield Request(row, partial(self._next, evidence, wanted * self._size, left))

    def _next(self, evidence: Evidence, wanted: int, left: int, row: Row, number: int) -> Examples:
        limit = min(wanted, max(1, math.floor(left / max(1.0, self._price(row)))))
        return self._table.open_of(row, self._order.next(evidence, number))[:limit]

    def _rows(
        self, evidence: Evidence, blocks: int, available: int
    ) -> Iterator[tuple[Row | Offer | None, int]]:
        """Yield configurations (None: the sampler chooses), each with its number of blocks in the batch."""
        if self.task.allocates and blocks > 0:
            rng = np.random.default_rng([abs(self.task.seed), self._table.trials])
            may_grow = available >= self._least
            calls = available + self._table.pending
            yield from Counter(evidence.propose(blocks, calls, self.is_open, rng, may_grow)).items()
            return
        for _ in range(blocks):
            started = self._table.started
            if len(started) < self.task.space_size or any(map(self.is_open, started)):
                yield None, 1

    def _available(self, evidence: Evidence) -> int:
        """Calls available for exploring; the rest is kept back for the winner and the baseline."""
        leader, baseline = self._reserved_for(evidence), self.task.baseline
        lacking = self.task.n_examples - self._size
        if self._confirm is True:
            # Calls kept for a rival not yet chosen; exploring pays for its first block.
            unknown = lacking * max([1.0, *map(self._price, self._table.started)])
            beside = [baseline] if leader is None else [baseline, leader]
            kept = self._cost(beside) + unknown * (leader is None) + self._extra_cost_of_pending()
            return math.floor(self._remaining - kept)
        if leader is None or not self._confirm:
            return self._remaining
        share = _CONFIRM_SHARE * self._max_calls
        if evidence.is_additive and lacking <= share:
            # Kept to compare the best configurations by their own scores.
            return math.floor(self._remaining - share)
        both = [] if self._is_sure(evidence, leader) else [leader, baseline]
        return self._remaining - (self._cost_if_low(both) or self._cost_if_low([leader]))

    def _cost(self, rows: Iterable[Row]) -> float:
        """Cost of measuring ``rows`` in full, in average calls; dropped configurations cost nothing."""
        kept = [row for row in rows if not self._table.is_dropped(row)]
        return sum(len(self._table.missing(row)) * self._price(row) for row in kept)

    def _extra_cost_of_pending(self) -> float:
        """By how many average calls the pending calls cost more than their number."""
        table = self._table
        return sum(table.pending_of(row) * (self._price(row) - 1.0) for row in table.started)

    def _cost_if_low(self, rows: Iterable[Row]) -> int:
        """Cost of measuring ``rows`` in full; 0 if that is too much to confirm with or cannot be paid."""
        cost = self._cost(rows)
        return math.ceil(cost) if cost <= min(_CONFIRM_SHARE * self._max_calls, self._remaining) else 0

    def _left_after(self, rows: Sequence[Row]) -> float:
        """Calls left after measuring ``rows`` and the baseline in full."""
        return self._remaining - self._cost({self.task.baseline, *rows})

    # Confirming.

    def _complete(self, evidence: Evidence, is_alone: bool) -> Iterator[Request]:
        """Measure the leader in full, and the baseline until it is clear which of the two is better."""
        leader = self._reserved_for(evidence)
        if self._confirm is True:
            yield from self._complete_both(evidence, leader, is_alone)
            return
        if not self._confirm or leader is None or self._has_target(evidence):
            return
        if evidence.is_additive and is_alone:
            leader = self._rival(evidence, leader) or leader
        if self._cost_if_low([leader]):
            yield from self._complete_row(leader)
        if is_alone and not self._is_sure(evidence, leader):
            shared = sorted(self._table.asked(leader))
            limit = min(self._remaining, self.batch_size * self._size)
            if limit and self._table.open_of(self.task.baseline, shared):
                yield Request(self.task.baseline, lambda row, _: self._table.open_of(row, shared)[:limit])

    def _complete_both(self, evidence: Evidence, leader: Row | None, is_alone: bool) -> Iterator[Request]:
        """Yield trials of the baseline and its best rival on all examples that they lack.

        Examples on which the baseline failed wait for a rival, which may fail on them too.
        """
        baseline, is_enough = self.task.baseline, self._has_target(evidence)
        rivals = [leader] if leader is not None and not is_enough else []
        if not is_alone:  # the leader may still change unless it is measured on half the examples
            rivals = [row for row in rivals if 2 * len(self._table.missing(row)) <= self.task.n_examples]
        waits = not (is_alone or is_enough or rivals) and self._table.has_tried_all(baseline)
        for row in dict.fromkeys(rivals if waits else [baseline, *rivals]):
            yield from self._complete_row(row)

    def _complete_row(self, row: Row) -> Iterator[Request]:
        """Yield a trial of ``row`` on all examples that it lacks, if that can be paid."""
        is_lacking = 0 < len(self._table.missing(row)) <= self._remaining
        if is_lacking and not self._table.is_dropped(row):
            yield Request(row, lambda row, number: self._table.missing(row))

    def _is_sure(self, evidence: Evidence, leader: Row) -> bool:
        """Whether the leader is known to be better than the baseline, or is the baseline."""
        baseline = self.task.baseline
        return leader == baseline or evidence.chance_of_gain(leader, baseline) >= _SURE

    def _reserved_for(self, evidence: Evidence) -> Row | None:
        """The leader, for which calls are kept back; with ``confirm=True``, the best except the baseline."""
        has_rival = self._confirm is True and not self._over
        return self._leader(evidence, apart_from=self.task.baseline if has_rival else None)

    def _leader(self, evidence: Evidence, apart_from: Row | None = None) -> Row | None:
        """The highest posterior mean among those that have enough scores to win, or get them in the end."""
        rows = [row for row in self._table.rows if row != apart_from and not self._table.is_dropped(row)]
        if self._confirm is True:
            rows = [row for row in rows if self._left_after([row]) >= 0]
        ranked = evidence.best_first(rows)
        eligible = {*(ranked if self._confirm is True else self._eligible(ranked))}
        able = (row for row in ranked if row in eligible or (self._confirm and self._cost_if_low([row])))
        return next(able, None)

    def _rival(self, evidence: Evidence, leader: Row) -> Row | None:
        """The best configuration that can be completed, if it may be better than the leader."""
        table = self._table
        rows = [row for row in table.rows if 0 < len(table.missing(row)) <= self._remaining]
        best = next(iter(evidence.best_first([row for row in rows if not table.is_dropped(row)])), None)
        return best if best is not None and evidence.chance_of_gain(best, leader) > 1.0 - _SURE else None

    def _eligible(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The baseline and those with enough scores; all, if there are none, or if predictors combine."""
        if self.task.is_combined:  # the scores of others say much about a combination
            return rows
        enough = {row for row in rows if len(self._table.means(row)) >= self._least}
        return [row for row in rows if not enough or row in enough or row == self.task.baseline]

    @property
    def _least(self) -> float:
        """Number of examples that a configuration needs scores on to win."""
        return min(_LEAST, self.task.n_examples / 2)

    # Ending.

    def _is_over(self, evidence: Evidence) -> bool:
        """Whether ``target`` or ``patience`` ends the search, judged after every batch."""
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
        """Whether the target is reached: by the leader's posterior mean until it has a full score."""
        if self._target is None or self._has_target(evidence):
            return self._target is not None
        return not self.is_full(leader) and float(evidence.posterior([leader])[0][0]) >= self._target

    def _has_target(self, evidence: Evidence) -> bool:
        """Whether the best fully measured configuration reaches the target."""
        if self._target is None:
            return False
        best = self._best_full(evidence.best_first(self._table.rows))
        return best is not None and self._table.mean(best) >= self._target

    def winner(self, ranked: Sequence[Row], is_cut_short: bool) -> Row:
        """The configuration with the highest posterior mean among those with enough scores.

        With ``confirm=True`` only the fully measured ones have enough; if the search is cut short, see
        `best_so_far`. Otherwise it takes scores on 20 examples, or on half of all examples if that is less.

        The winner never has a lower score than the baseline: with ``confirm=True`` on the examples that both
        have, otherwise where both are fully measured.
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
        eligible = self._eligible(ranked)
        full = self._best_full(eligible) if table.is_full(eligible[0]) else None
        return full or eligible[0]

    def _best_full(self, ranked: Sequence[Row]) -> Row | None:
        """The first fully measured one of ``ranked``, or the baseline if its score is better."""
        full = [row for row in ranked if self._table.is_full(row)]
        if self.task.baseline in full and not self._table.is_not_worse(full[0], self.task.baseline):
            return self.task.baseline
        return full[0] if full else None
