"""The result of a search, made from what it knows: at its end, and whenever it has to stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.study import Study

from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.plan import Plan
from mpromptune.engine.result import Measured, SearchResult
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.limits import Budget
from mpromptune.model.space import PromptSpace, Row

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """Makes results.

    Attributes:
        space: The configurations.
        plan: Says who wins.
        known: The scores, and what the surrogate makes of them.
        budget: What was used.
        binding: The limit that leaves fewer calls than the plan has, if any.
    """

    space: PromptSpace
    plan: Plan
    known: Knowledge
    budget: Budget
    binding: str | None = None

    def result(self, study: Study) -> SearchResult:
        """Of a search that has ended.

        Raises:
            SearchStoppedError: A limit was reached before anything was measured.
        """
        ranked = self._ranked()
        return self._of(self._winner(ranked, study), ranked, study)

    def so_far(self, study: Study) -> SearchResult | None:
        """Of a search that stopped, as by a limit; nothing that goes wrong here hides why it did."""
        try:
            ranked = self._ranked()
            best = self.plan.best_so_far(ranked, self.known.ledger) if ranked else None
            return None if best is None else self._of(best, ranked, study)
        except Exception:
            logger.exception("No result could be made of what was measured.")
            return None

    def _ranked(self) -> list[Row]:
        return self.known.best_first(self.known.ledger.rows())

    @property
    def _stopped_by(self) -> str | None:
        return self.budget.reached or self.binding

    def _winner(self, ranked: Sequence[Row], study: Study) -> Row:
        """The plan's, unless a limit cut it short; the plan may then not have got to its winner."""
        if self._stopped_by is None:
            return self.plan.winner(ranked, self.known.ledger)
        if not ranked:
            raise SearchStoppedError(
                f"{self._stopped_by} was reached before anything was measured: {self.budget.usage.total}.",
                study,
            )
        return self.plan.best_so_far(ranked, self.known.ledger)

    def _of(self, winner: Row, ranked: Sequence[Row], study: Study) -> SearchResult:
        ledger = self.known.ledger
        return SearchResult(
            best_params=self.space.params(winner),
            best_score=self._score(winner),
            baseline_score=self._score(self.plan.baseline),
            best_interval=self._interval(winner),
            calls=ledger.calls,
            n_examples=self.plan.n_examples,
            configurations=tuple(self._measured(ranked)),
            study=study,
            usage=self.budget.usage,
            stopped_by=self._stopped_by,
            overspent=self.budget.overspent,
            space=self.space,
            distances=self.known.encoding.distances(),
            drawn=self.known.drawn(),
            text_chance=self.known.text_chance(),
        )

    def _score(self, row: Row) -> float:
        """Its mean over the validation set; foreseen where it was not measured on all of it."""
        is_full = self.plan.is_full(row, self.known.ledger)
        return self.known.ledger.mean(row) if is_full else self.known.whole_score(row)[0]

    def _interval(self, row: Row) -> tuple[float, float]:
        if self.plan.is_full(row, self.known.ledger):
            return self.known.ledger.mean(row), self.known.ledger.mean(row)
        return self.known.whole_score(row)[1:]

    def _measured(self, rows: Sequence[Row]) -> list[Measured]:
        means, deviations = self.known.posterior(rows)
        return [
            Measured(
                params=self.space.params(row),
                scores=self.known.ledger.means(row),
                posterior_mean=mean,
                posterior_std=deviation,
                fully=self.plan.is_full(row, self.known.ledger),
            )
            for row, mean, deviation in zip(rows, means.tolist(), deviations.tolist(), strict=True)
        ]
