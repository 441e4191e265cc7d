"""The coordinator of a search: ask a round, measure it, tell, and repeat; what and when is the plan's."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from mpromptune.errors import SearchStoppedError
from mpromptune.execution import Outcome, Verdict, Workers
from mpromptune.knowledge import Knowledge
from mpromptune.plan import Plan, Request
from mpromptune.record import in_memory
from mpromptune.result import Measured, SearchResult
from mpromptune.schedule import Examples
from mpromptune.space import PromptSpace, Row
from mpromptune.trials import Asked, Trials

logger = logging.getLogger(__name__)

Callback = Callable[[Study, FrozenTrial], None]
OnCall = Callable[[int, int], None]

# Small rounds in a row without a single answer that are read as an outage.
_BARREN_ROUNDS = 10


@dataclass(frozen=True)
class _Running:
    """A trial whose examples are being measured; what an earlier run has measured is there at once."""

    asked: Asked
    examples: Examples
    futures: tuple[Future[Outcome], ...]

    @property
    def row(self) -> Row:
        return self.asked.row


@dataclass
class Coordinator:
    """The one thread that talks to the study; workers only score, and save what they have scored.

    Attributes:
        space: The configurations.
        plan: What is measured next, and who wins.
        workers: Score (configuration, example) pairs.
        trials: The trials of the study: the record of earlier runs first.
        known: The study, and what was learnt.
        failure_score: What an example scores when the candidate itself failed on it.
        callbacks: Called after every trial, in order.
        on_call: Called as program calls come back.
    """

    space: PromptSpace
    plan: Plan
    workers: Workers
    trials: Trials
    known: Knowledge
    failure_score: float
    callbacks: Sequence[Callback]
    on_call: OnCall | None
    in_flight: deque[list[_Running]] = field(default_factory=deque)
    barren: int = 0
    unsaved: Exception | None = None

    def __post_init__(self) -> None:
        self.study = self.known.study
        self.ledger = self.known.ledger

    def run(self) -> SearchResult:
        """Rounds until the plan has no more."""
        try:
            while self._fill():
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
            self._take_rest()
        except SearchStoppedError as error:
            self._abandon()
            error.study = self.study
            raise
        except (KeyboardInterrupt, SystemExit):
            self._abandon()
            raise
        except BaseException as error:
            self._abandon()
            raise self._stopped("an error outside the program calls", error) from error
        return self._result()

    def _fill(self) -> bool:
        """Starts rounds until enough are in flight; whether any is."""
        while len(self.in_flight) < self.plan.rounds_in_flight:
            round_: list[_Running] = []
            self.in_flight.append(round_)  # before it is filled: what has started is never lost
            for request in self.plan.next_round(self.known, alone=len(self.in_flight) == 1):
                self._start(request, round_)
            if not round_:
                self.in_flight.pop()
                break
        return bool(self.in_flight)

    def _start(self, request: Request, round_: list[_Running]) -> None:
        asked = self.trials.next(request.row)
        examples = self._examples(request, asked)
        if not examples:
            self.trials.drop(asked)
            return
        self.plan.assign(asked.row, examples)
        self.trials.start(asked, examples)
        futures = tuple(self._measure(asked, example) for example in examples)
        for future in futures:
            future.add_done_callback(self._count)
        round_.append(_Running(asked, examples, futures))

    def _examples(self, request: Request, asked: Asked) -> Examples:
        if asked.examples is not None:
            return asked.examples
        if request.row is None and not self.plan.is_open(asked.row):
            return ()  # in a space too large to list, a sampler may find nothing open
        return request.examples(asked.row, asked.number)

    def _measure(self, asked: Asked, example: int) -> Future[Outcome]:
        if asked.trial is not None and example not in asked.scores:
            params = self.space.params(asked.row)
            return self.workers.submit(params, example, partial(self._keep, asked.trial))
        measured: Future[Outcome] = Future()
        measured.set_result(Outcome(example, asked.scores.get(example)))
        return measured

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        """Saves a score in the worker that has it: it is paid for, whatever comes next."""
        if self._score_of(outcome) is None:
            return
        try:
            self.trials.keep(trial, outcome.example, outcome.score)
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self.workers.stopped.set()
            self.unsaved = self.unsaved or error

    def _count(self, future: Future[Outcome]) -> None:
        if not future.cancelled() and self.on_call is not None:
            self.on_call(1, self.plan.max_calls)

    def _finish(self, round_: list[_Running]) -> None:
        """Waits for a round and tells it in the order in which it was asked."""
        outcomes = [[future.result() for future in running.futures] for running in round_]
        if self.unsaved is not None:
            raise self._stopped("a score that could not be saved", self.unsaved)
        self._require_sense(round_, outcomes)
        for running, results in zip(list(round_), outcomes, strict=True):
            round_.remove(running)  # before the callbacks: what is told is not closed again
            self._tell(running, results)
        self.ledger.rounds += 1
        if self.plan.is_dropped(self.plan.baseline):
            error = _first_error(outcomes)
            if error is not None:
                raise self._stopped("the baseline's trials failing", error)
            self.plan.forgive(self.plan.baseline)  # it was an earlier run that stopped on them

    def _require_sense(self, round_: list[_Running], outcomes: list[list[Outcome]]) -> None:
        """Stops on a fatal error, and when a round's failures cannot be the candidates' own."""
        flat = [outcome for results in outcomes for outcome in results]
        verdicts = [self.workers.verdict(outcome) for outcome in flat]
        if Verdict.STOP in verdicts:
            fatal = flat[verdicts.index(Verdict.STOP)].error
            raise self._stopped("an error that no further call can mend", fatal)
        several = len({running.row for running in round_}) > 1
        self.barren = self.barren + 1 if set(verdicts) == {Verdict.RETRY} else 0
        many = self.barren >= _BARREN_ROUNDS or len(flat) >= self.plan.outage
        if None not in verdicts and (several or (self.barren and many)):
            raise self._stopped(f"all {len(flat)} calls of a round failing", _first_error(outcomes))

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        error = SearchStoppedError(
            f"The search stopped on {what}: {type(cause).__name__}: {cause}. "
            f"{self.ledger.calls} calls measured before are kept in the study.",
            self.study,
        )
        error.__cause__ = cause
        return error

    def _tell(self, running: _Running, outcomes: Sequence[Outcome]) -> None:
        measured = {o.example: s for o in outcomes if (s := self._score_of(o)) is not None}
        frozen = self._close(running, measured)
        if frozen is None:  # by an earlier run, which called back
            return
        for callback in self.callbacks:
            callback(self.study, frozen)

    def _score_of(self, outcome: Outcome) -> float | None:
        candidate_failed = self.workers.verdict(outcome) is Verdict.CANDIDATE
        return self.failure_score if candidate_failed else outcome.score

    def _abandon(self) -> None:
        """Stops the workers and closes every open trial, keeping the scores that came in."""
        self.workers.stopped.set()
        open_trials = [running for round_ in self.in_flight for running in round_]
        for running in open_trials:
            for future in running.futures:
                future.cancel()
        measured: dict[int, dict[int, float]] = {}
        for running in open_trials:
            done = [f.result() for f in running.futures if not f.cancelled() and not f.exception()]
            scores = {o.example: s for o in done if (s := self._score_of(o)) is not None}
            measured[running.asked.number] = scores
        try:
            for running in open_trials:
                self._close(running, measured[running.asked.number], abandoned=True)
            self.trials.abandon_open()
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self._leave_storage(error, measured)

    def _leave_storage(self, error: Exception, measured: Mapping[int, Mapping[int, float]]) -> None:
        logger.warning("Open trials could not be closed in the storage (%s); kept in memory.", error)
        try:
            self.study = in_memory(self.study, measured)
        except Exception:
            logger.exception("Nor can the storage be read.")

    def _close(
        self, running: _Running, measured: Mapping[int, float], abandoned: bool = False
    ) -> FrozenTrial | None:
        self.ledger.add(running.row, measured)
        lost = [example for example in running.examples if example not in measured]
        self.plan.settle(running.row, running.examples, lost)
        return self.trials.tell(running.asked, running.examples, measured, abandoned)

    def _take_rest(self) -> None:
        """Tells what a run with a larger budget measured, and this one does not ask for."""
        for asked in self.trials.rest():
            examples = asked.examples or ()
            self.plan.assign(asked.row, examples)
            self._close(_Running(asked, examples, ()), asked.scores, abandoned=True)

    def _result(self) -> SearchResult:
        ranked = self.known.best_first(self.ledger.rows())
        winner = self.plan.winner([row for row, _ in ranked], self.ledger)
        return SearchResult(
            best_params=self.space.params(winner),
            best_score=self.ledger.mean(winner),
            baseline_score=self.ledger.mean(self.plan.baseline),
            calls=self.ledger.calls,
            n_examples=self.plan.n_examples,
            configurations=tuple(self._measured([row for row, _ in ranked])),
            study=self.study,
        )

    def _measured(self, rows: Sequence[Row]) -> list[Measured]:
        means, variances = self.known.posterior(rows)
        return [
            Measured(
                params=self.space.params(row),
                scores=self.ledger.means(row),
                posterior_mean=mean,
                posterior_std=variance**0.5,
                fully=self.plan.is_full(row, self.ledger),
            )
            for row, mean, variance in zip(rows, means.tolist(), variances.tolist(), strict=True)
        ]


def _first_error(outcomes: list[list[Outcome]]) -> BaseException | None:
    return next((o.error for results in outcomes for o in results if o.error is not None), None)
