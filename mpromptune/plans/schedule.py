"""Which examples a configuration is measured on next, and how many calls are left to spend."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from mpromptune.calls.refusals import TRIES, are_few
from mpromptune.errors import InvalidArgumentError, require_count
from mpromptune.model.space import Row
from mpromptune.studies.ledger import Examples

logger = logging.getLogger(__name__)

SCHEDULE_NAMES = ("blocks", "mipro")

# NOTE: a share of a block: most configurations are seen to be poor on a few telling examples. Differences
# of regret, paired with whole blocks: with fewer calls than stock MIPROv2's, where not every configuration
# can be looked at otherwise, -0.32 +- 0.10 (20 rows of `benchmarks.quality`, GSM8K s43 and AG News); with as
# many or more -0.01 +- 0.03 (31 rows; -0.06 +- 0.06 on five tables with other seeds). With a third or a
# fifth of a block, gains on GSM8K s43 are losses on AG News.
_FIRST_SIGHT = 0.5

# Trials of one configuration that may fail before it is given up, unless on few of its examples.
MAX_FAILURES = 3


def partition(n_examples: int, block_size: int, seed: int) -> tuple[Examples, ...]:
    """Random blocks of ``block_size`` examples that partition ``range(n_examples)``.

    Sizes differ by at most one, so that no block is a poor remainder.

    Raises:
        InvalidArgumentError: ``block_size`` is not between 1 and ``n_examples``.
    """
    check_block_size(block_size, n_examples)
    order = np.random.default_rng([abs(seed), n_examples]).permutation(n_examples)
    blocks = np.array_split(order, math.ceil(n_examples / block_size))
    return tuple(tuple(int(i) for i in block) for block in blocks)


@dataclass
class Schedule:
    """The evaluation plan: shared blocks for the configurations of a round, each pair paid once.

    Attributes:
        n_examples: Size of the validation set.
        blocks: A partition of it; round r measures on block r, in rotation.
        max_calls: Budget of program calls.
        assigned: Configuration to the examples measured or being measured.
        baseline: The configuration that the winner is compared with.
        confirm: Whether winner and baseline are to end fully measured.
        failed: Configuration to the examples that each of its failed trials lacks.
        lost: Configuration to the examples that could not be measured.
        aside: Examples that cannot be answered: only finalists are asked on them once more.
        spent: Calls made or committed to.
        price: How many times the average call one of a configuration costs.
    """

    n_examples: int
    blocks: tuple[Examples, ...]
    max_calls: int
    baseline: Row
    confirm: bool = True
    assigned: dict[Row, set[int]] = field(default_factory=dict)
    failed: dict[Row, list[set[int]]] = field(default_factory=dict)
    lost: dict[Row, set[int]] = field(default_factory=dict)
    aside: AbstractSet[int] = frozenset()
    spent: int = 0
    price: Callable[[Row], float] = lambda row: 1.0

    @property
    def remaining(self) -> int:
        """Calls not yet committed to."""
        return self.max_calls - self.spent

    def missing(self, row: Row) -> Examples:
        """The examples that ``row`` is not yet measured on, block by block; failed ones last.

        Of those set aside, what it has not been asked on: a passing failure may be over.
        """
        order = [e for block in self.blocks for e in block]
        return self._lacking(row, order, self.aside & self.lost.get(row, set()))

    def _lacking(self, row: Row, order: Sequence[int], without: AbstractSet[int]) -> Examples:
        have, lost = self._asked(row) | without, self.lost.get(row, set())
        return tuple(sorted((e for e in order if e not in have), key=(lost | self.aside).__contains__))

    def has_tried_all(self, row: Row) -> bool:
        """Whether ``row`` lacks only examples that could not be measured before."""
        return self.lost.get(row, set()).issuperset(self.missing(row))

    def next_examples(self, row: Row, round_number: int, limit: int) -> Examples:
        """The round's block, or the next later block that ``row`` lacks, cut to ``limit``."""
        closed = self._closed(row)
        for offset in range(len(self.blocks)):
            block = self.blocks[(round_number + offset) % len(self.blocks)]
            lacking = tuple(e for e in block if e not in closed)
            if lacking:
                return lacking[:limit]
        return ()

    def first_of(self, order: Sequence[int], row: Row, limit: int) -> Examples:
        """A block's worth of the first in ``order`` that ``row`` lacks, half at first; cut to ``limit``.

        Those that could not be measured before come last. A block of all examples stays whole.
        """
        size = len(self.blocks[0])
        if len(self.blocks) > 1 and not self.assigned.get(row):
            size = math.ceil(size * _FIRST_SIGHT)
        return self._lacking(row, order, self.aside)[: min(limit, size)]

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Commits to measuring ``row`` on ``examples``."""
        self.assigned.setdefault(row, set()).update(examples)
        self.spent += len(examples)

    def release(self, row: Row, examples: Iterable[int]) -> AbstractSet[int]:
        """Takes back what could not be measured: its budget returns.

        Returns:
            What could not be in an earlier trial either.
        """
        lost = set(examples)
        self.assigned[row] -= lost
        self.lost.setdefault(row, set()).update(lost)
        self.spent -= len(lost)
        if lost:
            self.failed.setdefault(row, []).append(lost)
        return lost & self._given_up(row)

    def _given_up(self, row: Row) -> AbstractSet[int]:
        """Examples that enough trials of ``row`` lack."""
        times = Counter(example for lost in self.failed.get(row, ()) for example in lost)
        return {example for example, failures in times.items() if failures >= TRIES}

    def is_dropped(self, row: Row) -> bool:
        """Whether so many trials of ``row``, and examples, failed that no further call is risked on it."""
        failures = sum(not lost <= self.aside for lost in self.failed.get(row, ()))
        return failures >= MAX_FAILURES and not self._lacks_few(row)

    def _lacks_few(self, row: Row) -> bool:
        """Whether ``row`` fails on so few examples that it can be judged on the others."""
        answered = self.assigned.get(row, set())
        lost = self.lost.get(row, set()) - answered - self.aside
        return are_few(len(lost), len(answered))

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``."""
        self.failed.pop(row, None)

    def is_affordable(self, row: Row) -> bool:
        """Whether ``row`` can still be fully measured, together with the baseline."""
        return not self.is_dropped(row) and self.available_beside([row]) >= 0

    def available(self) -> int:
        """Calls free for exploration while no finalist is known.

        With `confirm`, the baseline's missing examples are kept back, and all those of one other
        configuration, at the highest price.
        """
        unknown = self.n_examples * max([1.0, *map(self.price, self.assigned)])
        return self.remaining - math.ceil(self.confirm * (self.cost([self.baseline]) + unknown))

    def available_beside(self, finalists: Iterable[Row]) -> int:
        """Calls free for exploration when all ``finalists`` are to end fully measured, with `confirm`."""
        return self.remaining - math.ceil(self.confirm * self.cost({self.baseline, *finalists}))

    def cost(self, rows: Iterable[Row]) -> float:
        """What measuring ``rows`` on all that they lack takes, in average calls; nothing for dropped ones."""
        return sum(len(self.missing(row)) * self.price(row) for row in rows if not self.is_dropped(row))

    def is_open(self, row: Row) -> bool:
        """Whether measuring ``row`` further could matter.

        It has examples left, and they are affordable: a configuration that cannot be fully measured
        any more cannot win, so no call is spent on it.
        """
        return len(self._closed(row)) < self.n_examples and self.is_affordable(row)

    def _closed(self, row: Row) -> AbstractSet[int]:
        """Examples that ``row`` is not to be explored on."""
        return self._asked(row) | self.aside

    def _asked(self, row: Row) -> AbstractSet[int]:
        """Examples that ``row`` is measured on, being measured on, or failed on often enough."""
        given_up = self._given_up(row) if self._lacks_few(row) else set()
        return self.assigned.get(row, set()) | given_up

    def anything_open(self, space_size: int) -> bool:
        """Whether any of the ``space_size`` configurations is open."""
        untouched = len(self.assigned) < space_size and self.available() >= 0
        return untouched or any(self.is_open(row) for row in self.assigned)

    def size_of_round(self, batch_size: int, available: int) -> int:
        """Trials of the next round: ``batch_size``, or as many blocks as the budget still holds."""
        return min(batch_size, math.ceil(available / len(self.blocks[0])))


def check_block_size(block_size: int, n_examples: int) -> None:
    """Refuses blocks that do not fit into the validation set.

    Raises:
        InvalidArgumentError: ``block_size`` is not between 1 and ``n_examples``.
    """
    if not 1 <= block_size <= n_examples:
        raise InvalidArgumentError(
            f"block_size must be between 1 and the {n_examples} validation examples; got {block_size}."
        )


def check_budget(max_calls: int, n_examples: int, confirm: bool) -> None:
    """Refuses budgets in which winner and baseline cannot be measured.

    Raises:
        InvalidArgumentError: ``max_calls`` is too low.
    """
    least = 2 * n_examples if confirm else 1
    if max_calls < least:
        raise InvalidArgumentError(
            f"max_calls={max_calls} is below the {least} calls that measuring the winner and the "
            f"baseline on all {n_examples} validation examples takes. Raise max_calls, use fewer "
            "validation examples, or pass confirm=False."
        )


def warn_of_little(max_calls: int, n_examples: int, confirm: bool) -> None:
    """Warns of a budget that confirming takes most of: prompts are compared on what is left."""
    kept = 2 * n_examples * confirm
    if 2 * kept > max_calls:
        logger.warning(
            "Measuring the winner and the baseline on all %d validation examples takes up to %d of "
            "max_calls=%d: little is left to find a winner with. Raise max_calls, use fewer validation "
            "examples, or pass confirm=False.",
            n_examples,
            kept,
            max_calls,
        )


@dataclass(frozen=True)
class Minibatches:
    """DSPy's own arguments of the plan of MIPROv2.

    Attributes:
        size: Examples of a trial.
        full_eval_steps: Trials from one full evaluation to the next.
        enabled: False when every trial is a full evaluation and there are no others.
    """

    size: int = 35
    full_eval_steps: int = 5
    enabled: bool = True

    def within(self, n_examples: int) -> Minibatches:
        """The plan for a validation set; a minibatch of all of it is a full evaluation itself.

        Raises:
            InvalidArgumentError: A number cannot work.
        """
        require_count("minibatch_full_eval_steps", self.full_eval_steps)
        if not self.enabled or require_count("minibatch_size", self.size) == n_examples:
            return Minibatches(n_examples, self.full_eval_steps, enabled=False)
        if self.size > n_examples:
            raise InvalidArgumentError(
                f"minibatch_size={self.size} exceeds the {n_examples} validation examples."
            )
        return self

    def as_arguments(self) -> dict[str, int]:
        """What of it must stay as it is in a study."""
        return {"minibatch_size": self.size, "minibatch_full_eval_steps": self.full_eval_steps}

    def calls(self, num_trials: int, n_examples: int) -> int:
        """What ``num_trials`` trials cost, with the baseline and the full evaluations."""
        return stock_calls(num_trials, n_examples, self.enabled, self.size, self.full_eval_steps)

    def trials_for(self, max_calls: int, n_examples: int) -> int:
        """The most trials that ``max_calls`` calls allow.

        Raises:
            InvalidArgumentError: Not even one.
        """
        if max_calls < (least := self.calls(1, n_examples)):
            raise InvalidArgumentError(
                f"max_calls={max_calls} is below the {least} calls of MIPROv2's shortest plan: the baseline "
                f"on all {n_examples} validation examples, one trial, and a full evaluation of it."
            )
        # Every trial costs at least one call, so there are no more of them than calls.
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


def default_block_size(n_examples: int) -> int:
    """Ten examples, or all where there are fewer."""
    return min(10, n_examples)
