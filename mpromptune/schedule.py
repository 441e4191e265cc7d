"""Which examples a configuration is measured on next, and how many calls are left to spend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpromptune.errors import InvalidArgumentError
from mpromptune.space import Row

Examples = tuple[int, ...]


def partition(n_examples: int, block_size: int, seed: int) -> tuple[Examples, ...]:
    """Random blocks of ``block_size`` examples that partition ``range(n_examples)``.

    Sizes differ by at most one, so that no block is a poor remainder.

    Raises:
        InvalidArgumentError: ``block_size`` is not between 1 and ``n_examples``.
    """
    if not 1 <= block_size <= n_examples:
        raise InvalidArgumentError(
            f"block_size must be between 1 and the {n_examples} validation examples; got {block_size}."
        )
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
        spent: Calls made or committed to.
    """

    n_examples: int
    blocks: tuple[Examples, ...]
    max_calls: int
    assigned: dict[Row, set[int]] = field(default_factory=dict)
    spent: int = 0

    @property
    def remaining(self) -> int:
        return self.max_calls - self.spent

    def missing(self, row: Row) -> Examples:
        """The examples that ``row`` is not yet measured on, block by block."""
        have = self.assigned.get(row, set())
        return tuple(e for block in self.blocks for e in block if e not in have)

    def next_examples(self, row: Row, round_number: int, limit: int) -> Examples:
        """The round's block, or the next later block that ``row`` lacks, cut to ``limit``."""
        have = self.assigned.get(row, set())
        for offset in range(len(self.blocks)):
            block = self.blocks[(round_number + offset) % len(self.blocks)]
            lacking = tuple(e for e in block if e not in have)
            if lacking:
                return lacking[:limit]
        return ()

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """Commits to measuring ``row`` on ``examples``."""
        self.assigned.setdefault(row, set()).update(examples)
        self.spent += len(examples)

    def release(self, row: Row, examples: Iterable[int]) -> None:
        """Takes back what could not be measured: its budget returns."""
        lost = set(examples)
        self.assigned[row] -= lost
        self.spent -= len(lost)

    def available(self, finalists: Iterable[Row]) -> int:
        """Calls free for exploration once every finalist has been kept its missing examples."""
        return self.remaining - sum(len(self.missing(row)) for row in set(finalists))

    def cautious_available(self, baseline: Row) -> int:
        """As `available`, for a winner that nothing is known of yet."""
        return self.available([baseline]) - self.n_examples

    def affordable(self, rows: Iterable[Row], baseline: Row) -> list[Row]:
        """Those configurations that can still be fully measured together with the baseline."""
        return [row for row in rows if self.available([row, baseline]) >= 0]

    def fully_measured(self) -> list[Row]:
        return [row for row, have in self.assigned.items() if len(have) == self.n_examples]

    def size_of_round(self, batch_size: int, available: int) -> int:
        """Trials of the next round: ``batch_size``, or as many blocks as the budget still holds."""
        return min(batch_size, math.ceil(available / len(self.blocks[0])))


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
    if not minibatch or minibatch_size >= n_examples:
        per_trial = n_examples
    else:
        per_trial = minibatch_size
    full = _stock_full_evaluations(num_trials, minibatch_full_eval_steps) if minibatch else 0
    return n_examples * (1 + full) + per_trial * num_trials


def _stock_full_evaluations(num_trials: int, steps: int) -> int:
    """Counts them as MIPROv2's trial numbering does: a full evaluation takes a number of its own."""
    last = num_trials + num_trials // steps + 1 + (num_trials % steps != 0)
    number, full = 1, 0
    for _ in range(num_trials):
        number += 1
        if number % (steps + 1) == 0 or number == last - 1:
            number, full = number + 1, full + 1
    return full


def default_batch_size(num_threads: int, block_size: int) -> int:
    """Smallest q of at least 4 for which one round holds a work item for every worker."""
    return max(4, math.ceil(num_threads / block_size))


def mean_scores(scores: Mapping[Row, Mapping[int, float]]) -> dict[Row, float]:
    """Mean score of every configuration over the examples that it was measured on."""
    return {row: sum(by.values()) / len(by) for row, by in scores.items() if by}
