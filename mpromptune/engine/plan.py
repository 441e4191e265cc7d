"""The interface of plans: a plan decides what is measured next, and which configuration wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Offer
from mpromptune.engine.scores import ScoreTable
from mpromptune.model.space import Examples, Row

# NOTE: up to `_SMALL_POOL` threads, trials do not depend on the number of threads: there are always
# `_IN_FLIGHT` calls in flight, with which 32 threads are busy for 0.95 of the time. They are at most
# `_SHARE` of the budget, because calls in flight were chosen without the scores of the others.
_SMALL_POOL = 32
_IN_FLIGHT = 96
_SHARE = 0.08
# NOTE: calls in flight for each thread of a larger pool, and the largest share of the budget that they may
# be. In a simulation of 2130 calls with lognormal latencies (sigma 0.5), 64 threads are busy for 0.90, 0.94
# and 0.95 of the time with three, four and five calls each; 128 threads for 0.80, 0.86 and 0.88.
_PER_THREAD = 4
_LARGEST_SHARE = 0.25
# Number of batches that the calls in flight are divided into, so that the pool never waits for a decision.
_BATCHES = 3


@dataclass(frozen=True)
class Task:
    """The search problem that a plan is made for.

    Attributes:
        n_examples: Size of the validation set.
        max_calls: Budget of program calls.
        baseline: The configuration that the winner is compared with.
        space_size: Number of configurations.
        seed: Seeds every random draw, together with the number of earlier trials.
        num_threads: Calls made at the same time.
        is_combined: Whether configurations combine the candidates of several predictors.
        allocates: Whether the plan chooses the configurations by the evidence; otherwise a sampler does.
    """

    n_examples: int
    max_calls: int
    baseline: Row
    space_size: int
    seed: int
    num_threads: int = 1
    is_combined: bool = False
    allocates: bool = False

    def batch_size(self, trial_size: int) -> int:
        """Number of trials or blocks, of ``trial_size`` calls each, in a batch."""
        return max(2, round(self._usual_calls / (_BATCHES * trial_size)))

    def batches_in_flight(self, calls_of_a_batch: int) -> int:
        """Most batches measured at the same time; at least two, so that the pool always has work."""
        calls = self._usual_calls
        if self.num_threads > _SMALL_POOL:
            calls = max(calls, min(_PER_THREAD * self.num_threads, _LARGEST_SHARE * self.max_calls))
        return max(2, math.ceil(calls / calls_of_a_batch))

    @property
    def _usual_calls(self) -> float:
        """Calls in flight for a pool of up to 32 threads."""
        return min(_IN_FLIGHT, _SHARE * self.max_calls)


@dataclass(frozen=True)
class Request:
    """A trial to start.

    Attributes:
        row: Its configuration, or the offer of a proposer; None leaves the choice to the sampler.
        examples: ``examples(row, trial number)`` returns the examples to measure it on.
    """

    row: Row | Offer | None
    examples: Callable[[Row, int], Examples]


class Plan(Protocol):
    """Decides how the budget is spent, by the table of scores. `options.PLANS` lists the classes.

    Every request becomes a trial, and is in the table, before the next request is taken.

    Attributes:
        task: The search problem.
        batch_size: Trials, or blocks, in a batch.
        batches_in_flight: Batches at the same time: while one is told, the others keep the workers busy.
        outage: Number of failures in a batch that counts as an outage even if all are of one configuration.
        arguments: The arguments that must not change within a study.
        measures_baseline: Whether the baseline has to be measured on all examples.
    """

    task: Task
    batch_size: int
    batches_in_flight: int
    outage: int
    arguments: Mapping[str, Any]
    measures_baseline: bool

    @property
    def first(self) -> Examples:
        """The examples of the baseline's first trial."""

    def is_open(self, row: Row) -> bool:
        """Whether the sampler may propose ``row``."""

    def next_batch(self, evidence: Evidence) -> Iterator[Request]:
        """Yield the trials of the next batch; none when there is nothing to start now."""

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Limit the plan to ``calls`` calls in all, if that is less than ``task.max_calls``.

        It is called after every batch.

        Args:
            calls: The calls told so far, and those that the remaining budgets allow.
            price: Cost of a call of a configuration, in average calls.
        """

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` is fully evaluated."""

    def winner(self, ranked: Sequence[Row], is_cut_short: bool) -> Row:
        """The configuration to return.

        Args:
            ranked: The measured ones by posterior mean, highest first; at least one if it is cut short.
            is_cut_short: Whether the search ends before the plan does.
        """


def best_so_far(table: ScoreTable, ranked: Sequence[Row], baseline: Row) -> Row:
    """The configuration to return when a search is cut short.

    It is the first of the fully measured ones in ``ranked``, or, if only the baseline is fully measured, the
    first of all. Configurations with a lower score than the baseline on the examples that both have, or with
    no such examples, are skipped; if none is left, the baseline is returned. While the baseline has no
    score, none is skipped.
    """
    full = [row for row in ranked if row != baseline and table.is_full(row)]
    if not table.means(baseline):
        return (full or ranked)[0]
    return next((row for row in full or ranked if table.is_not_worse(row, baseline)), baseline)
