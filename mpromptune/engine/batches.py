"""The plan of batches: explore by what is likely to be best, then confirm what that costs little."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.pairs import Pairs
from mpromptune.engine.plan import Request
from mpromptune.engine.schedule import Confirm, first_keys
from mpromptune.model.space import FloatArray, Row
from mpromptune.model.statistics import Stopping
from mpromptune.storage.ledger import Examples, Ledger

logger = logging.getLogger(__name__)

# NOTE: of all calls, what `confirm="auto"` may take beside exploring. The winner is mostly measured on three
# quarters of the examples when exploring ends.
_LITTLE = 0.2
# Posterior probability with which the winner is better than the baseline, after which it is not compared
# with it any further.
_SURE = 0.95
# Failures in a round that are read as an outage, though all of one configuration.
_OUTAGE = 10


@dataclass
class BatchPlan:
    """Batches of a few examples for each of several configurations until the budget is spent.

    A configuration has as many blocks in a batch as it wins; a block is ``block_size`` examples, the same
    for all that lack them, those early that tell the leaders apart.

    Attributes:
        pairs: What was asked, and the budget.
        baseline: The configuration that the winner is compared with.
        space_size: Number of configurations.
        block_size: Examples of a block.
        batch_size: Blocks in a batch.
        rounds_in_flight: Batches being measured at any time, at most.
        seed: Of all draws, together with the number of trials before.
        allocates: Whether the plan chooses the configurations by what is known; otherwise a sampler does.
        confirm: Whether winner and baseline end measured on all examples; "auto", where that costs little.
        stopping: When to stop before the budget is spent.
    """

    pairs: Pairs
    baseline: Row
    space_size: int
    block_size: int
    batch_size: int = 1
    rounds_in_flight: int = 2
    seed: int = 0
    allocates: bool = True
    confirm: Confirm = "auto"
    stopping: Stopping = field(default_factory=Stopping)
    _trials: int = 0
    _judged: int = 0
    _over: bool = False

    def __post_init__(self) -> None:
        self.n_examples = self.pairs.n_examples
        self.max_calls = self.pairs.max_calls
        self.outage = min(_OUTAGE, self.n_examples)

    @cached_property
    def _uniform(self) -> FloatArray:
        """A fixed order for all: what one configuration is measured on, another one is too."""
        return first_keys(self.n_examples, self.seed)

    def is_open(self, row: Row) -> bool:
        """Whether measuring ``row`` further could matter: with ``confirm=True``, what can still win."""
        affordable = self.confirm is not True or self._left_beside([row]) >= 0
        return self.pairs.is_open(row) and affordable

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Commits to measuring ``row`` on ``examples``."""
        self._trials += 1
        self.pairs.assign(row, examples)

    def settle(self, row: Row, examples: Sequence[int], lost: Iterable[int]) -> None:
        """Takes back what could not be measured."""
        again = self.pairs.release(row, lost)
        if again:
            message = "Configuration %s failed again on validation examples %s, and is judged by the others."
            logger.warning(message, row, sorted(again))

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Lowers the budget; what is kept back for winner and baseline counts at their price."""
        self.pairs.max_calls = min(self.max_calls, calls)
        self.pairs.price = price

    def is_dropped(self, row: Row) -> bool:
        """Whether ``row`` has failed too often."""
        return self.pairs.is_dropped(row)

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``."""
        self.pairs.forgive(row)

    def is_stuck(self, ledger: Ledger) -> bool:
        """Whether the baseline has failed too often, and was never answered."""
        return self.is_dropped(self.baseline) and not ledger.means(self.baseline)

    def is_full(self, row: Row, ledger: Ledger) -> bool:
        """Whether ``row`` has a score on every example that can be answered, from however many trials."""
        return ledger.covers(row, self.n_examples)

    def next_round(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """A batch to explore with; once the calls for that are spent, what winner and baseline lack."""
        self._set_aside(known.ledger)
        before = self.pairs.spent
        if not self.pairs.assigned.get(self.baseline) and before < self.pairs.max_calls:
            yield Request(self.baseline, self._first_of_baseline)
        self._over = self._is_over(known)
        if not self._over:
            yield from self._explore(known, self._available(known))
        if self.pairs.spent == before:
            yield from self._confirm(known, alone)

    def _set_aside(self, ledger: Ledger) -> None:
        """Leaves out the examples that cannot be answered; one that is after all comes back."""
        unanswerable = ledger.refusals.unanswerable()
        if new := sorted(unanswerable - self.pairs.aside):
            logger.warning(
                "Validation examples %s fail for more configurations than they are answered for: left out.",
                new,
            )
        self.pairs.aside = unanswerable

    def _first_of_baseline(self, row: Row, number: int) -> Examples:
        """All where it is to be measured in full anyway: that tells how hard the examples are."""
        examples = self.pairs.open_of(row, np.argsort(self._uniform, kind="stable").tolist())
        return examples if self.confirm is True else examples[: min(self.block_size, self.pairs.remaining)]

    def _explore(self, known: Knowledge, available: int) -> Iterator[Request]:
        until = self.pairs.spent + available
        blocks = min(self.batch_size, math.ceil(available / self.block_size))
        for row, wanted in self._rows(known, blocks, available):
            left = until - self.pairs.spent
            if left <= 0:  # trials of an earlier run may be longer than was planned for them now
                break
            if row is None or left >= self.pairs.price(row):
                yield Request(row, partial(self._next, known, wanted * self.block_size, left))

    def _next(self, known: Knowledge, wanted: int, left: int, row: Row, number: int) -> Examples:
        limit = min(wanted, max(1, math.floor(left / max(1.0, self.pairs.price(row)))))
        return self.pairs.open_of(row, self._order(known, number))[:limit]

    def _rows(self, known: Knowledge, blocks: int, available: int) -> Iterator[tuple[Row | None, int]]:
        """Configurations and the blocks that each has in the next batch."""
        if blocks <= 0:
            return
        if not self.allocates:
            for _ in range(blocks):
                if self._is_anything_open():
                    yield None, 1
            return
        rng = np.random.default_rng([abs(self.seed), self._trials])
        in_flight = self.pairs.spent - known.ledger.calls
        chosen = known.propose(blocks, available + in_flight, self.is_open, self.pairs.assigned, rng)
        yield from Counter(chosen).items()

    def _is_anything_open(self) -> bool:
        return len(self.pairs.assigned) < self.space_size or any(map(self.is_open, self.pairs.assigned))

    def _order(self, known: Knowledge, number: int) -> list[int]:
        r"""All examples, those early that tell more: a weighted sample without replacement [Efraimidis2006]_.

        An example is placed by ``-log(u) / w``, with u uniform, and w the information of one more score of
        the leader. All configurations have the same u, so that they are compared on the same examples; but
        where many configurations are met once each, every trial has its own, so that all examples are met.
        So it does with a sampler that does not look at examples, and without weights: nobody would find out
        who is good at those that tell most and at nothing else.

        .. [Efraimidis2006] P. S. Efraimidis, P. G. Spirakis. Weighted random sampling with a reservoir.
            Information Processing Letters 97, 2006.
        """
        keys = self._uniform
        if known.is_additive or not self.allocates:
            keys = -np.log(1.0 - np.random.default_rng([abs(self.seed), number, 1]).random(self.n_examples))
        information = known.information() if self.allocates else None
        keys = keys if information is None else keys / information
        return [int(example) for example in np.argsort(keys, kind="stable")]

    def _available(self, known: Knowledge) -> int:
        """Calls to explore with; the rest is kept for winner and baseline."""
        leader = self._finalist(known)
        if self.confirm is True:
            # The first block of a rival that nobody knows yet is part of what is kept for it.
            lacking = self.n_examples - self.block_size
            unknown = lacking * max([1.0, *map(self.pairs.price, self.pairs.assigned)])
            beside = [self.baseline] if leader is None else [self.baseline, leader]
            kept = self.pairs.cost(beside) + unknown * (leader is None) + self._dearer_in_flight(known.ledger)
            return math.floor(self.pairs.remaining - kept)
        if leader is None or not self.confirm:
            return self.pairs.remaining
        share = _LITTLE * self.pairs.max_calls
        if known.is_additive and self.n_examples - self.block_size <= share:
            # For those that lead, to tell them apart by scores of their own.
            return math.floor(self.pairs.remaining - share)
        both = [] if self._is_sure(known, leader) else [leader, self.baseline]
        return self.pairs.remaining - (self._little(both) or self._little([leader]))

    def _dearer_in_flight(self, ledger: Ledger) -> float:
        """What the calls in flight will have cost above as many average ones."""
        asked = self.pairs.assigned.items()
        return sum((len(es) - len(ledger.means(row))) * (self.pairs.price(row) - 1.0) for row, es in asked)

    def _little(self, rows: Iterable[Row]) -> int:
        """What measuring ``rows`` in full costs, if that is little and can be paid; or else nothing."""
        cost = self.pairs.cost(rows)
        return math.ceil(cost) if cost <= min(_LITTLE * self.pairs.max_calls, self.pairs.remaining) else 0

    def _left_beside(self, rows: Sequence[Row]) -> float:
        """Calls left when these and the baseline are to end fully measured."""
        return self.pairs.remaining - self.pairs.cost({self.baseline, *rows})

    def _confirm(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """What the winner lacks, and the baseline as far as it takes to say which of the two is better.

        The winner is the best of what has been told; if it is another one when all has been, that is
        measured too, as far as calls are left.
        """
        leader = self._finalist(known)
        if self.confirm is True:
            yield from self._confirm_fully(known, leader, alone)
            return
        if not self.confirm or leader is None or self._has_target(known):
            return
        if known.is_additive and alone:
            leader = self._rival(known, leader) or leader
        if self._little([leader]):
            yield from self._complete(leader)
        if alone and not self._is_sure(known, leader):
            shared = sorted(self.pairs.assigned[leader])
            limit = min(self.pairs.remaining, self.batch_size * self.block_size)
            if limit and self.pairs.open_of(self.baseline, shared):
                yield Request(self.baseline, lambda row, _: self.pairs.open_of(row, shared)[:limit])

    def _confirm_fully(self, known: Knowledge, leader: Row | None, alone: bool) -> Iterator[Request]:
        """All that both lack; what failed for the baseline waits for a rival that may fail on it, too."""
        is_enough = self._has_target(known)
        is_found = leader is not None and not is_enough and (alone or self._is_well_known(leader))
        rivals = [leader] if leader is not None and is_found else []
        waits = not (alone or is_enough or rivals) and self.pairs.has_tried_all(self.baseline)
        for row in dict.fromkeys(rivals if waits else [self.baseline, *rivals]):
            yield from self._complete(row)

    def _complete(self, row: Row) -> Iterator[Request]:
        """What ``row`` lacks, if that can be paid."""
        is_lacking = 0 < len(self.pairs.missing(row)) <= self.pairs.remaining
        if is_lacking and not self.is_dropped(row):
            yield Request(row, lambda row, number: self.pairs.missing(row))

    def _is_well_known(self, row: Row) -> bool:
        return 2 * len(self.pairs.missing(row)) <= self.n_examples

    def _is_sure(self, known: Knowledge, leader: Row) -> bool:
        """Whether it is known which is better, the leader or the baseline."""
        return leader == self.baseline or known.chance_of_gain(leader, self.baseline) >= _SURE

    def _finalist(self, known: Knowledge) -> Row | None:
        """Whom calls are kept back for: the leader, or with ``confirm=True`` the baseline's best rival.

        The baseline is measured in any case then, so its rival costs nothing that another could have.
        """
        has_rival = self.confirm is True and not self._over
        return self._leader(known, apart_from=self.baseline if has_rival else None)

    def _leader(self, known: Knowledge, apart_from: Row | None = None) -> Row | None:
        """The highest posterior mean of what was measured; with ``confirm=True``, of what can still win."""
        rows = [row for row in known.ledger.rows() if row != apart_from and not self.is_dropped(row)]
        if self.confirm is True:
            rows = [row for row in rows if self._left_beside([row]) >= 0]
        return known.best_first(rows)[0] if rows else None

    def _rival(self, known: Knowledge, leader: Row) -> Row | None:
        """The best of those whose lacking examples can be paid, if it may be better than the leader."""
        rows = [
            row for row in known.ledger.rows() if 0 < len(self.pairs.missing(row)) <= self.pairs.remaining
        ]
        best = next(iter(known.best_first([row for row in rows if not self.is_dropped(row)])), None)
        return best if best is not None and known.chance_of_gain(best, leader) > 1.0 - _SURE else None

    def _is_over(self, known: Knowledge) -> bool:
        """Whether the user's rules say stop, on what has been told; asked again after every round."""
        rules, ledger = self.stopping, known.ledger
        if (rules.target is None and rules.patience is None) or not ledger.calls:
            return False
        leader = self._leader(known) or self.baseline
        if rules.patience is not None and self._judged < ledger.rounds:
            self._judged = ledger.rounds
            gain = known.largest_gain(leader, lambda row: row != leader and self.is_open(row))
            rules.note(gain, known.standard_error(self.n_examples))
        return rules.is_hopeless() or self._is_good_enough(leader, known)

    def _is_good_enough(self, leader: Row, known: Knowledge) -> bool:
        """By the leader's posterior, until it is fully measured; by what was measured then."""
        if self._has_target(known):
            return True
        is_full = self.is_full(leader, known.ledger)
        return not is_full and self.stopping.is_enough(float(known.posterior([leader])[0][0]))

    def _has_target(self, known: Knowledge) -> bool:
        """Whether what would be returned now is fully measured, and reaches the target."""
        best = self._best_full(known.best_first(known.ledger.rows()), known.ledger)
        return best is not None and self.stopping.is_enough(known.ledger.mean(best))

    def winner(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The highest posterior mean; with ``confirm=True``, of what is fully measured.

        Not one that scores less than the baseline where both have all examples, or with ``confirm=True``
        on all that both have.
        """
        if self.confirm is True:
            best = self._best_full(ranked, ledger) or self.baseline
            is_worse = bool(ledger.means(self.baseline)) and not ledger.is_not_worse(best, self.baseline)
            return self.baseline if is_worse else best
        full = {row for row in (ranked[0], self.baseline) if self.is_full(row, ledger)}
        return self._best_full(ranked, ledger) or ranked[0] if len(full) > 1 else ranked[0]

    def best_so_far(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """As `winner`; with ``confirm=True``, not worse than the baseline as far as was measured."""
        if self.confirm is not True:
            return self.winner(ranked, ledger)
        return ledger.best_so_far(ranked, self.baseline, self.n_examples)

    def _best_full(self, ranked: Sequence[Row], ledger: Ledger) -> Row | None:
        """The first that is fully measured, or the baseline where that measured better."""
        full = [row for row in ranked if self.is_full(row, ledger)]
        if self.baseline in full and not ledger.is_not_worse(full[0], self.baseline):
            return self.baseline
        return full[0] if full else None
