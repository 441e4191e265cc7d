"""The seam between a search and its evaluation plan: what is measured next, and who wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.scores import Examples, ScoreTable
from mpromptune.model.space import Row

# NOTE: threads up to which trials do not depend on their number, and the calls in flight for all of these, at
# which 32 threads are busy for 0.95 of the time; but no more than a part of the budget, since what is asked
# for before earlier answers are known is asked blindly.
_SMALL_POOL = 32
_IN_FLIGHT = 96
_SHARE = 0.08
# NOTE: calls in flight for each thread of a larger pool, which rides out slow calls, and what part of the
# budget they may be. In a simulation of 2130 calls with lognormal latencies (sigma 0.5), 64 threads are busy
# for 0.90, 0.94 and 0.95 of the time with three, four and five; 128 for 0.80, 0.86 and 0.88.
_PER_THREAD = 4
_LARGEST_SHARE = 0.25
# Batches that these calls are made of, so that the pool never waits for a decision.
_BATCHES = 3


@dataclass(frozen=True)
class Task:
    """What a plan is made for.

    Attributes:
        n_examples: Size of the validation set.
        max_calls: Budget of program calls.
        baseline: The configuration that the winner is compared with.
        space_size: Number of configurations.
        seed: Of all draws, together with the number of trials before.
        num_threads: Calls in flight at once.
        is_combined: Whether configurations combine the candidates of several predictors.
        allocates: Whether the plan chooses the configurations by what is known; otherwise a sampler does.
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
        """Trials or blocks of ``trial_size`` calls each in a batch."""
        return max(2, round(self._usual_calls / (_BATCHES * trial_size)))

    def batches_in_flight(self, calls_of_a_batch: int) -> int:
        """Batches being measured at any time, at most; at least two, so that the pool never drains."""
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
        row: Its configuration; None leaves the choice to the sampler.
        examples: ``examples(row, trial number)``: what it is measured on.
    """

    row: Row | None
    examples: Callable[[Row, int], Examples]


class Plan(Protocol):
    """Spends the budget, by what the table of scores says. A class is listed in `options.PLANS`.

    Every request becomes a trial, and is in the table, before the next one is taken.

    Attributes:
        task: What it was made for.
        batch_size: Trials, or blocks, of a batch.
        batches_in_flight: Batches at a time: while one is being told, the others keep the workers busy.
        outage: Failures in a batch that are read as an outage, though all of one configuration.
        arguments: What must stay as it is in a study.
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
        """Examples that the baseline is measured on first of all."""

    def is_open(self, row: Row) -> bool:
        """Whether the sampler may propose ``row``."""

    def next_batch(self, evidence: Evidence) -> Iterator[Request]:
        """The trials of the next batch; none when there is nothing to start now."""

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Only ``calls`` calls can be paid in all, if those are fewer than the task's; said every batch.

        Args:
            calls: Those told so far and those that what is left allows.
            price: How many times the average call one of a configuration costs.
        """

    def is_full(self, row: Row) -> bool:
        """Whether ``row`` is fully evaluated."""

    def winner(self, ranked: Sequence[Row], is_cut_short: bool) -> Row:
        """The configuration to return.

        Args:
            ranked: Those measured, by posterior mean, the highest first; at least one if cut short.
            is_cut_short: Whether the search ends before the plan does.
        """


def best_so_far(table: ScoreTable, ranked: Sequence[Row], baseline: Row) -> Row:
    """Whom to return when a search is cut short.

    The first of ``ranked`` that is fully measured, or, where nothing is but the baseline, the first of all;
    passing over what scores worse than the baseline on the examples that both were measured on, or shares
    none with it. If nothing is left, the baseline; but where that has no score yet, there is nothing to pass
    over.
    """
    full = [row for row in ranked if row != baseline and table.is_full(row)]
    if not table.means(baseline):
        return (full or ranked)[0]
    return next((row for row in full or ranked if table.is_not_worse(row, baseline)), baseline)
