"""The seam between a search and its evaluation plan: what is measured next, and who wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mpromptune.engine.knowledge import Knowledge
from mpromptune.model.space import Row
from mpromptune.storage.ledger import Examples, Ledger


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
    """Spends the budget. Only the coordinator's thread talks to it, so it may count as it goes.

    Every request becomes a trial at once: `assign` is called before the next request is taken, and
    `settle` when the trial has been told.
    """

    n_examples: int
    max_calls: int
    baseline: Row
    batch_size: int  # configurations in a round
    rounds_in_flight: int  # at most; while one is being told, the others keep the workers busy
    outage: int  # failures in a round that are read as an outage, though all of one configuration

    def is_open(self, row: Row) -> bool:
        """Whether the sampler may propose ``row``."""

    def next_round(self, known: Knowledge, alone: bool) -> Iterator[Request]:
        """The trials of the next round; none when there is nothing to start now.

        Args:
            known: Everything told so far.
            alone: Whether all earlier rounds have been told.
        """

    def assign(self, row: Row, examples: Sequence[int]) -> None:
        """A trial of ``row`` has started."""

    def settle(self, row: Row, examples: Sequence[int], lost: Iterable[int]) -> None:
        """That trial has been told; the ``lost`` ones of its examples have no score."""

    def afford(self, calls: int, price: Callable[[Row], float]) -> None:
        """Only ``calls`` calls can be paid in all, if that is less than ``max_calls``; asked every round.

        Args:
            calls: Those told so far and those that what is left allows.
            price: How many times the average call one of a configuration costs.
        """

    def is_dropped(self, row: Row) -> bool:
        """Whether so many trials of ``row`` failed that no further call is risked on it."""

    def is_stuck(self, ledger: Ledger) -> bool:
        """Whether the baseline's failures leave nothing to compare with, so that the search has to stop."""

    def forgive(self, row: Row) -> None:
        """Forgets the failures of ``row``: they ended an earlier run, and may have been mended since."""

    def is_full(self, row: Row, ledger: Ledger) -> bool:
        """Whether ``row`` is fully evaluated."""

    def winner(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The configuration to return, of those measured, by posterior mean, the highest first."""

    def best_so_far(self, ranked: Sequence[Row], ledger: Ledger) -> Row:
        """The configuration to return if the search ends before the plan does; ``ranked`` as above."""
