"""The plan of blocks: explore by expected improvement, then confirm winner and baseline."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from mpromptune.model.difficulty import as_matrix, telling_first
from mpromptune.model.space import Row
from mpromptune.model.stopping import Stopping
from mpromptune.plans.knowledge import Knowledge
from mpromptune.plans.plan import Request
from mpromptune.plans.schedule import Schedule
from mpromptune.studies.ledger import Examples, Ledger

logger = logging.getLogger(__name__)

# NOTE: the parts of a large pool's rounds in flight that remain when so large a share of the calls, and no
# more than so many rounds, are left. What is asked late decides who wins, and should know of the rounds
# before it: regret at 64 workers with four rounds to the end 0.9, 2.0 and 1.5; with these, three and two,
# 0.6, 1.5 and 1.2 in 2 % more time; with two for the last 45 % 0.5, 1.1 and 1.1 in 15 % more (GSM8K s43 and
# s42, AG News; 30 seeds each).
_NARROWING = {0.75: (0.5, 12), 0.5: (0.25, 6)}
# NOTE: so many are paid for at once, while the last rounds come in, instead of waiting to know the one: a
# pool drains once, not two or three times. In a simulation of 64 workers and 1630 calls 0.89 of their time
# is used instead of 0.82, and regrets are the same within noise (GSM8K s43 and s42, AG News; +-0.2); with
# one thread they change by -0.05 +- 0.05. With as many rounds in flight to the end as before it 0.91 would
# be used, and regrets on GSM8K were 1.9 and 2.1 (40 seeds).
# No more than a third of the budget pays for them: where calls are few, those to explore with are worth more.
_FINALISTS = 3
_SHARE_OF_FINALISTS = 1 / 3


@dataclass
class BlockPlan:
    """Rounds on blocks of examples until the budget is spent or the user's rules say stop.

    Attributes:
        schedule: Blocks and budget.
        space_size: Number of configurations.
        batch_size: Configurations per round.
        rounds_in_flight: Rounds being measured at any time, at most: more than two for a large pool.
        stopping: When to stop before the budget is spent.
        by_difficulty: Whether a trial is measured on examples that tell much, rather than on its round's
            block; the baseline comes first then, on all of them, since it tells how hard they are.
    """

    schedule: Schedule
    space_size: int
    batch_size: int
    rounds_in_flight: int = 2
    stopping: Stopping = field(default_factory=Stopping)
    by_difficulty: bool = False
    _rounds: int = 0
    _judged: int = 0
    _over: bool = False

    def __post_init__(self) -> None:
        self.n_examples = self.schedule.n_examples
        self.max_calls = self.schedule.max_calls
        self.baseline = self.schedule.baseline
        self.outage = len(self.schedule.blocks[0])

    def is_open(self, row: Row) -> bool:
        """Whether measuring ``row`` further could matter."""
        return self.schedule.is_open(row)

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Commits to measuring ``row`` on ``examples``."""
        self.schedule.assign(row, examples)

    def settle(self, row: Row, examples: Sequence[int], lost: Iterable[int]) -> None:
        """Takes back what could not be measured."""
        again = self.schedule.release(row, lost)
        if again:
            message = "Configuration %s failed again on validation examples %s, and is judged by the others."
            logger.warning(message, row, sorted(again))

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Lowers the budget; what is kept back for winner and baseline counts at their price."""
        self.schedule.max_calls = min(self.max_calls, calls)
        self.schedule.price = price

    def is_dropped(self, row: Row) -> bool:
        """Whether ``row`` has failed too often."""
        return self.schedule.is_dropped(row)

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``."""
        self.schedule.forgive(row)

    def is_stuck(self, ledger: Ledger) -> bool:
        """Whether the baseline has failed too often, and was never answered."""
        return self.is_dropped(self.baseline) and not ledger.means(self.baseline)

    def is_full(self, row: Row, ledger: Ledger) -> bool:
        """Whether ``row`` has a score on every example that can be answered, from however many trials."""
        return ledger.covers(row, self.n_examples)

    def rounds_now(self) -> int:
        """Fewer towards the end for a large pool, where each has calls for the leader as well; but two."""
        return max(min(2, self.rounds_in_flight), math.ceil(self._part_in_flight * self.rounds_in_flight))

    @property
    def _part_in_flight(self) -> float:
        """Of the rounds: all, but for a large pool towards the end.

        All without `confirm`: there the leader's calls, which occupy it meanwhile, would be extra ones.
        """
        if not (self._is_wide and self.schedule.confirm):
            return 1.0
        left, budget, round_ = self.schedule.remaining, self.schedule.max_calls, self._round_calls
        bounds = {part: min(share * budget, rounds * round_) for part, (share, rounds) in _NARROWING.items()}
        return min((part for part, bound in bounds.items() if left <= bound), default=1.0)

    @property
    def _is_late(self) -> bool:
        return self._part_in_flight < 1.0

    def next_round(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """A round of the search proper; once nothing else can be explored, what finalists and baseline lack.

        Towards the end of a large pool's search, part of what the leader lacks comes with every round.
        """
        self._set_aside(known.ledger)
        before, is_late = self.schedule.spent, self._is_late
        yield from self._explore(known)
        has_explored = self.schedule.spent > before
        if has_explored and is_late and self._available(known) > 0:
            yield from self._advance(known)
        elif is_late or not has_explored:
            yield from self._confirm(known, alone and not has_explored)

    def _set_aside(self, ledger: Ledger) -> None:
        """Leaves out the examples that cannot be answered; one that is after all comes back."""
        unanswerable = ledger.refusals.unanswerable()
        if new := sorted(unanswerable - self.schedule.aside):
            logger.warning(
                "Validation examples %s fail for more configurations than they are answered for: left out.",
                new,
            )
        self.schedule.aside = unanswerable

    def _explore(self, known: Knowledge) -> Iterator[Request]:
        self._over = self._is_over(known)
        if self._over:
            return
        before, available = self.schedule.spent, self._available(known)
        until = before + available
        telling = self._telling(known)
        for _ in range(self.schedule.size_of_round(self.batch_size, available)):
            first = not self.schedule.assigned.get(self.baseline)
            if not first and not self.schedule.anything_open(self.space_size):
                break
            if first:
                yield from self._first_of_baseline(until)
                until += self.schedule.confirm * (self.schedule.spent - before)  # they are kept back
                continue
            limit = until - self.schedule.spent
            if limit <= 0:  # trials of an earlier run may be longer than was planned for them now
                break
            by_round = partial(self._block, self._rounds, limit)
            yield Request(None, partial(self._first_of, telling, limit) if telling else by_round)
        self._rounds += self.schedule.spent > before

    def _first_of_baseline(self, until: int) -> Iterator[Request]:
        """A block, as of any other; in a large pool, the rest for workers that have nothing else to do.

        All of it at once where that says how hard the examples are.
        """
        if self.by_difficulty and self.schedule.confirm:
            yield Request(self.baseline, self._missing)
            return
        limit = self.n_examples if self.schedule.confirm else until - self.schedule.spent
        yield Request(self.baseline, partial(self._block, 0, limit))
        if self._is_wide and self.schedule.confirm and self.schedule.missing(self.baseline):
            yield Request(self.baseline, self._missing, background=True)

    @property
    def _is_wide(self) -> bool:
        return self.rounds_in_flight > 2

    @property
    def _round_calls(self) -> int:
        return self.batch_size * len(self.schedule.blocks[0])

    def _telling(self, known: Knowledge) -> list[int]:
        """All examples, those that tell more the earlier; none before anything has been told."""
        if not self.by_difficulty or not known.ledger.calls:
            return []
        scores = [known.ledger.means(row) for row in known.ledger.rows()]
        examples = [e for block in self.schedule.blocks for e in block]
        return telling_first(as_matrix(scores, self.n_examples), examples)

    def _first_of(self, order: Sequence[int], limit: int, row: Row, number: int) -> Examples:
        return self.schedule.first_of(order, row, limit)

    def _block(self, round_number: int, limit: int, row: Row, number: int) -> Examples:
        return self.schedule.next_examples(row, round_number, limit)

    def _missing(self, row: Row, number: int) -> Examples:
        return self.schedule.missing(row)

    def _available(self, known: Knowledge) -> int:
        """Calls for exploration now; the rest is kept for finalists and baseline."""
        free = self.schedule.available()
        if not known.ledger.scores:
            return max(free, 0)
        if free - (_FINALISTS - 1) * self.n_examples >= self._round_calls:
            return free  # enough for a round, whoever they are
        finalists = self._finalists(known)
        free = self.schedule.available_beside(finalists)
        # A large pool would idle through small rounds: a third of its time for a tenth of the calls.
        least = self._round_calls / 2 if finalists and self._is_wide and self.schedule.confirm else 1
        return free if free >= least else 0

    def _advance(self, known: Knowledge) -> Iterator[Request]:
        """Up to half a round's calls for who leads: should it win, they need not be made later."""
        calls = math.ceil(self._round_calls / 2)
        leader = next(filter(self.schedule.missing, self._finalists(known)), None)
        if leader is not None:
            yield Request(leader, lambda row, number: self.schedule.missing(row)[:calls])

    def _confirm(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """Measures what finalists and baseline still lack, as soon as it is known who they are.

        The baseline's examples do not depend on any result, so they fill the wait; but those that have
        failed wait for a finalist that may fail on them, too, and show whose fault it is.
        """
        if not self.schedule.confirm:
            return
        finalists = self._to_confirm(known, alone)
        is_awaited = not finalists and not alone and not self._has_target(known)
        waits = is_awaited and self.schedule.has_tried_all(self.baseline)
        for row in dict.fromkeys(finalists if waits else [self.baseline, *finalists]):
            is_lacking = 0 < len(self.schedule.missing(row)) <= self.schedule.remaining
            if is_lacking and not self.is_dropped(row):
                yield Request(row, self._missing)

    def _to_confirm(self, known: Knowledge, alone: bool) -> list[Row]:
        """Finalists that are found while the last rounds come in; or the one, once all has been told."""
        if not known.ledger.scores or self._has_target(known):
            return []
        if not self._over and self._are_found(finalists := self._finalists(known)):
            return finalists
        return [self._finalist(known)] if alone else []

    def _are_found(self, finalists: Sequence[Row]) -> bool:
        """Whether they are several, or one that leads with half of the examples measured."""
        lacking = [len(self.schedule.missing(row)) for row in finalists]
        return len(lacking) > 1 or any(2 * n <= self.n_examples for n in lacking)

    def _finalist(self, known: Knowledge) -> Row:
        """Whom the calls kept back are for: the leader, or the best rival of a baseline that leads.

        The baseline is measured in any case, so its rival costs nothing that another could have.
        """
        return self._leader(known, apart_from=None if self._over else self.baseline)[0]

    def _finalists(self, known: Knowledge) -> list[Row]:
        """The leader, and as many of the next rivals of the baseline as can be paid with it.

        Several take no more than a share of the budget, so that enough is explored with.
        """
        rows = [row for row, _ in self._rivals(known, self.baseline)[:_FINALISTS]]
        most = min(_SHARE_OF_FINALISTS * self.schedule.max_calls, self.schedule.available_beside(()))
        while len(rows) > 1 and self.schedule.cost(rows) > most:
            rows.pop()
        return rows

    def _leader(self, known: Knowledge, apart_from: Row | None = None) -> tuple[Row, float]:
        """The highest posterior mean among what can still be fully measured, and that mean."""
        rivals = self._rivals(known, apart_from)
        return rivals[0] if rivals else (self.baseline, float("-inf"))

    def _rivals(self, known: Knowledge, apart_from: Row | None) -> list[tuple[Row, float]]:
        """What can still be fully measured, and its posterior mean, the highest first."""
        rows = [row for row in known.ledger.rows() if row != apart_from]
        return known.best_first([row for row in rows if self.schedule.is_affordable(row)])

    def _is_over(self, known: Knowledge) -> bool:
        """Whether the user's rules say stop, on what has been told; asked again after every round."""
        rules, ledger = self.stopping, known.ledger
        if (rules.target is None and rules.patience is None) or not ledger.calls:
            return False
        leader, mean = self._leader(known)
        if rules.patience is not None and self._judged < ledger.rounds:
            self._judged = ledger.rounds
            gain = known.largest_gain(leader, lambda row: row != leader and self.is_open(row))
            rules.note(gain, known.standard_error(self.n_examples))
        return rules.is_hopeless() or self._is_good_enough(leader, mean, known)

    def _is_good_enough(self, leader: Row, mean: float, known: Knowledge) -> bool:
        """By the leader's posterior, until it is fully measured; by what was measured then."""
        if self._has_target(known):
            return True
        return not self.is_full(leader, known.ledger) and self.stopping.is_enough(mean)

    def _has_target(self, known: Knowledge) -> bool:
        """Whether what would be returned now is fully measured, and reaches the target."""
        ranked = [row for row, _ in known.best_first(known.ledger.rows())]
        best = self._best_full(ranked, known.ledger)
        return best is not None and self.stopping.is_enough(known.ledger.mean(best))

    def winner(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The highest posterior mean; with `confirm`, of what is fully measured.

        A baseline that lacks examples is compared on those that it was answered on.
        """
        if not self.schedule.confirm:
            return ranked[0]
        best = self._best_full(ranked, ledger) or self.baseline
        is_worse = bool(ledger.means(self.baseline)) and not ledger.is_not_worse(best, self.baseline)
        return self.baseline if is_worse else best

    def best_so_far(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The highest posterior mean; with `confirm`, not worse than the baseline as far as was measured."""
        if not self.schedule.confirm:
            return ranked[0]
        return ledger.best_so_far(ranked, self.baseline, self.n_examples)

    def _best_full(self, ranked: Sequence[Row], ledger: Ledger) -> Row | None:
        """The first that is fully measured, or the baseline where that measured better."""
        full = [row for row in ranked if self.is_full(row, ledger)]
        if self.baseline in full and not ledger.is_not_worse(full[0], self.baseline):
            return self.baseline
        return full[0] if full else None
