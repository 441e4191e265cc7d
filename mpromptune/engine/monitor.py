"""Reports the progress of a search to a callback; nothing here can change or end the search."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.plan import Plan
from mpromptune.engine.trials import Trials
from mpromptune.execution.interrupts import contained
from mpromptune.execution.limits import Budget
from mpromptune.execution.pool import Workers
from mpromptune.model.space import Row
from mpromptune.show import analysis
from mpromptune.show.progress import OnProgress, Progress, Speed, Standing
from mpromptune.storage.findings import Findings, Measured

logger = logging.getLogger(__name__)

# NOTE: seconds between reports while a batch is awaited: often enough for a person who watches.
_BEAT = 0.5


@dataclass
class Monitor:
    """Reports before and after every batch, at intervals while one is awaited, and at the end.

    It fits no model: the estimates are those of the plan's last decision. It runs in the search's thread.

    Attributes:
        on_progress: The callback; None if there is none, or if it has raised an error.
        plan: The plan, with its budget and baseline.
        evidence: The scores and the model.
        budget: The usage so far.
        workers: The workers, which know the calls in flight.
        trials: The trials told, and those of the record that are left.
        answered: Returns the number of answered calls in open trials.
        clock: Returns the time in seconds.
    """

    on_progress: OnProgress | None
    plan: Plan
    evidence: Evidence
    budget: Budget
    workers: Workers
    trials: Trials
    answered: Callable[[], int]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self._last = self.clock()
        self._speed = Speed(self.clock)
        self._best: Row | None = None
        self._estimates: dict[Row, tuple[float, float]] = {}  # mean and standard deviation, by row

    def report(self) -> None:
        """Report the progress now."""
        self._safely(lambda: self._tell(*self._standings(), self._seconds_left()))

    def beat(self) -> None:
        """Report the progress if the last report is `_BEAT` seconds old."""
        if self.clock() - self._last >= _BEAT:
            self.report()

    def finish(self, result: Findings) -> None:
        """Report the result at the end of the search."""
        best = _found(analysis.winner(result), result.best_score)
        baseline = _found(analysis.baseline(result), result.baseline_score)
        self._safely(lambda: self._tell(best, baseline, 0.0, finished=True))

    def _safely(self, step: Callable[[], None]) -> None:
        """Call ``step``; an error in it is logged, and no further report is made."""
        if self.on_progress is None:
            return
        try:
            contained(step)
        except Exception:
            self.on_progress = None
            logger.exception("Progress is not reported any more; the search continues.")

    def _tell(
        self, best: Standing | None, baseline: Standing | None, left: float | None, finished: bool = False
    ) -> None:
        assert self.on_progress is not None
        self._last = self.clock()
        progress = Progress(
            calls=self._calls(),
            max_calls=self.plan.task.max_calls,
            trials=self.trials.told,
            batches=self.evidence.table.batches,
            n_examples=self.plan.task.n_examples,
            best=best,
            baseline=baseline,
            load=self.workers.load,
            usage=self.budget.usage.total,
            limits=self.budget.limits,
            seconds=self._last - self._began,
            seconds_left=left,
            finished=finished,
            proposals=0 if self.evidence.growth is None else self.evidence.growth.asked,
        )
        self.on_progress(progress)

    def _calls(self) -> int:
        return self.evidence.table.calls + self.answered()

    def _seconds_left(self) -> float | None:
        if self.trials.record:  # answers from the record take no time, so they do not count for the speed
            self._speed = Speed(self.clock)
        self._speed.note(self._calls())
        table = self.evidence.table
        rest = self.plan.task.max_calls - table.proposal_calls - self._calls()
        affordable = self.budget.calls_left(table.usage, table.calls, table.proposal_usage)
        if affordable is not None:
            rest = min(rest, affordable[1] - self.answered())
        return self._speed.seconds_for(rest)

    def _standings(self) -> tuple[Standing | None, Standing | None]:
        table, baseline, ranking = self.evidence.table, self.plan.task.baseline, self.evidence.ranking
        if ranking and self.evidence.is_fitted:
            rows = [ranking[0], baseline]
            normal = zip(*(values.tolist() for values in self.evidence.posterior(rows)), strict=True)
            self._estimates = dict(zip(rows, normal, strict=True))
            # The baseline need not be among the ranked configurations.
            measured = [row for row in rows if table.means(row)]
            self._best = max(measured, key=lambda row: self._estimates[row][0], default=None)
        best = self._best or max(table.rows, key=table.mean, default=None)
        return self._standing(best), self._standing(baseline)

    def _standing(self, row: Row | None) -> Standing | None:
        scores = {} if row is None else self.evidence.table.means(row)
        if row is None or not scores:
            return None
        measured = sum(scores.values()) / len(scores)
        mean, std = self._estimates.get(row) or (measured, self.evidence.standard_error(len(scores)))
        return Standing(mean, std, measured, len(scores))


def _found(measured: Measured | None, score: float) -> Standing | None:
    """The standing of a configuration in a result; None if it was not measured."""
    if measured is None:
        return None
    return Standing(measured.posterior_mean, measured.posterior_std, score, len(measured.scores))
