"""The coordinator of a search: ask a round, measure it, tell, and repeat; what and when is the plan's."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mpromptune.attributes import EXAMPLES, SCORES
from mpromptune.errors import SearchInterrupted, SearchStoppedError
from mpromptune.execution import INFRASTRUCTURE, Outcome, Verdict, Workers
from mpromptune.interrupts import GRACE, deferred, interrupted, wait_for
from mpromptune.knowledge import Knowledge
from mpromptune.outage import Answer, Reliability, last_failures
from mpromptune.plan import Plan, Request
from mpromptune.result import Measured, SearchResult
from mpromptune.samplers import distributions_of
from mpromptune.schedule import Examples
from mpromptune.space import PromptSpace, Row

Callback = Callable[[Study, FrozenTrial], None]
OnCall = Callable[[int, int], None]

logger = logging.getLogger(__name__)

# NOTE: seconds that calls in flight are given when an error, not a user, ends the search: they are
# paid for, so nearly all of them are worth waiting for; one that hangs is not.
_LAST_CALLS = 60.0

# Small rounds in a row without a single answer that are read as an outage.
_BARREN_ROUNDS = 10


@dataclass(frozen=True)
class _Running:
    """A trial whose examples are being measured."""

    trial: Trial
    row: Row
    examples: Examples
    futures: tuple[Future[Outcome], ...]


@dataclass
class Coordinator:
    """The one thread that talks to the study; workers only score.

    Attributes:
        space: The configurations.
        plan: What is measured next, and who wins.
        workers: Score (configuration, example) pairs.
        known: The study, and what was learnt.
        failure_score: What an example scores when the candidate itself failed on it.
        callbacks: Called after every trial, in order.
        on_call: Called as program calls come back.
        grace: Seconds that an interrupt leaves to calls in flight.
    """

    space: PromptSpace
    plan: Plan
    workers: Workers
    known: Knowledge
    failure_score: float
    callbacks: Sequence[Callback]
    on_call: OnCall | None
    grace: float = GRACE
    in_flight: deque[list[_Running]] = field(default_factory=deque)
    barren: int = 0
    reliability: Reliability = field(default_factory=Reliability)

    def __post_init__(self) -> None:
        self.study = self.known.study
        self.ledger = self.known.ledger
        self.distributions = distributions_of(self.space)

    def run(self) -> SearchResult:
        """Rounds until the plan has no more."""
        try:
            while self._fill():
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
        except KeyboardInterrupt as signalled:
            self._abandon(self.grace)
            raise self._interrupted(signalled) from signalled
        except SystemExit:
            self._abandon(self.grace)
            raise
        except SearchStoppedError as error:
            raise self._closed(error) from error.__cause__
        except BaseException as error:
            raise self._closed(self._stopped("an error outside the program calls", error)) from error
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

    def _ask(self, row: Row | None) -> Trial:
        if row is not None:
            self.study.enqueue_trial(self.space.params(row))
        return self.study.ask(fixed_distributions=self.distributions)

    def _start(self, request: Request, round_: list[_Running]) -> None:
        trial = self._ask(request.row)
        with deferred():  # what has been submitted is to be found in its round
            self._submit(request, trial, round_)

    def _submit(self, request: Request, trial: Trial, round_: list[_Running]) -> None:
        row = self.space.row(trial.params)
        examples = request.examples(row, trial.number)
        unwanted = request.row is None and not self.plan.is_open(row)
        if unwanted or not examples:  # in a space too large to list, a sampler may find nothing open
            self.study.tell(trial, state=TrialState.FAIL)
            return
        self.plan.assign(row, examples)
        trial.set_user_attr(EXAMPLES, list(examples))
        params = self.space.params(row)
        futures = tuple(self.workers.submit(params, example) for example in examples)
        for future in futures:
            future.add_done_callback(self._count)
        round_.append(_Running(trial, row, examples, futures))

    def _count(self, future: Future[Outcome]) -> None:
        if not future.cancelled() and self.on_call is not None:
            self.on_call(1, self.plan.max_calls)

    def _finish(self, round_: list[_Running]) -> None:
        """Waits for a round and tells it in the order in which it was asked."""
        wait_for(future for running in round_ for future in running.futures)
        outcomes = [[future.result() for future in running.futures] for running in round_]
        self._require_sense(round_, outcomes)
        for running, results in zip(list(round_), outcomes, strict=True):
            with deferred():  # what is told is not closed again
                round_.remove(running)
                frozen = self._tell(running, results)
            for callback in self.callbacks:
                callback(self.study, frozen)
        self.ledger.rounds += 1
        if self.plan.is_dropped(self.plan.baseline):
            raise self._stopped("the baseline's trials failing", _first_error(outcomes))

    def _require_sense(self, round_: list[_Running], outcomes: list[list[Outcome]]) -> None:
        """Stops on a fatal error, and when failures cannot be the candidates' own."""
        mine = [(r.row, outcome) for r, results in zip(round_, outcomes, strict=True) for outcome in results]
        answers, run = self._last_failures(mine)
        for _, outcome in (*mine, *run):
            if self.workers.verdict(outcome) is Verdict.STOP:
                raise self._stopped("an error that no further call can mend", outcome.error)
        known = self.reliability.after(answers, run)
        barren = bool(run) and all(outcome.error is not None for _, outcome in mine)
        infrastructure = {self.workers.verdict(outcome) for _, outcome in mine} <= INFRASTRUCTURE
        self.barren = self.barren + 1 if barren and infrastructure else 0
        many = self.barren >= _BARREN_ROUNDS or (self.barren and len(mine) >= self.plan.outage)
        several = len({row for row, _ in mine}) > 1 and (self.barren or known.is_empty)
        if barren and (several or many):
            raise self._stopped(f"all {len(mine)} calls of a round failing", run[0][1].error)
        if run and known.is_outage(run, self.plan.outage):
            raise self._stopped(f"the last {len(run)} calls failing, whatever was asked", run[0][1].error)
        self.reliability.note(mine)

    def _last_failures(self, mine: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
        """All answers in hand, and the failures since the last success if any is of this round.

        Calls of the rounds behind may be signs of life; they are waited for while that is open.
        """
        own = {id(outcome) for _, outcome in mine}
        while True:
            answers, pending = self._in_hand()
            run = last_failures(answers)
            if not any(id(outcome) in own for _, outcome in run):
                return answers, []
            if not pending:
                return answers, run
            wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)

    def _in_hand(self) -> tuple[list[Answer], list[Future[Outcome]]]:
        calls = [(r.row, future) for round_ in self.in_flight for r in round_ for future in r.futures]
        done = [(row, future) for row, future in calls if future.done()]
        pending = [future for _, future in calls if not future.done()]
        return [(row, future.result()) for row, future in done], pending

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        message = f"The search stopped on {what}: {type(cause).__name__}: {cause}."
        error = SearchStoppedError(message, self.study)
        error.__cause__ = cause
        return error

    def _closed(self, error: SearchStoppedError) -> SearchStoppedError:
        """The error with all that was measured, once the last calls have come back."""
        self._abandon()
        error.args = (f"{error} {self.ledger.calls} calls measured before are kept in the study.",)
        error.result = self._so_far()
        return error

    def _tell(self, running: _Running, outcomes: Sequence[Outcome]) -> FrozenTrial:
        measured = {o.example: s for o in outcomes if (s := self._score_of(o)) is not None}
        return self._close(running, measured)

    def _score_of(self, outcome: Outcome) -> float | None:
        candidate_failed = self.workers.verdict(outcome) is Verdict.CANDIDATE
        return self.failure_score if candidate_failed else outcome.score

    def _abandon(self, grace: float = _LAST_CALLS) -> None:
        """Stops the workers and closes every open trial, keeping the scores that come in until then."""
        self.workers.stopped.set()
        futures = [future for round_ in self.in_flight for r in round_ for future in r.futures]
        try:
            wait_for([future for future in futures if not future.cancel()], grace)
        finally:  # another interrupt ends the waiting, and leaves no trial open either
            with deferred():
                self._close_all()

    def _close_all(self) -> None:
        for running in [running for round_ in self.in_flight for running in round_]:
            came = [f for f in running.futures if f.done() and not f.cancelled() and not f.exception()]
            done = [future.result() for future in came]
            self._close(running, {o.example: o.score for o in done if o.score is not None})
        self.in_flight.clear()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # asked, but never started

    def _interrupted(self, signalled: BaseException) -> SearchInterrupted:
        error = interrupted(signalled)(
            f"The search was interrupted; {self.ledger.calls} calls measured before are kept in the study. "
            "What is caught as SearchInterrupted has `.study`, `.result` and, after a compile, `.program`: "
            "the best so far.",
            self.study,
            self._so_far(),
        )
        if isinstance(error, SystemExit):  # which ends the interpreter without a word
            logger.warning("%s", error)
        return error

    def _so_far(self) -> SearchResult | None:
        """What has been measured, whoever leads; nothing that goes wrong here hides why it ended."""
        try:
            ranked = self.known.best_first(self.ledger.rows())
            return self._result(ranked[0][0]) if ranked else None
        except Exception:
            logger.exception("No result could be made of what was measured.")
            return None

    def _close(self, running: _Running, measured: dict[int, float]) -> FrozenTrial:
        """Tells a trial: its mean when every example was measured, FAIL otherwise."""
        self.ledger.add(running.row, measured)
        lost = [example for example in running.examples if example not in measured]
        self.plan.settle(running.row, running.examples, lost)
        running.trial.set_user_attr(EXAMPLES, list(measured))
        running.trial.set_user_attr(SCORES, list(measured.values()))
        if len(measured) < len(running.examples):
            return self.study.tell(running.trial, state=TrialState.FAIL)
        return self.study.tell(running.trial, sum(measured.values()) / len(measured))

    def _result(self, winner: Row | None = None) -> SearchResult:
        """By default, with the plan's winner; the baseline may then be taken as measured."""
        ranked = self.known.best_first(self.ledger.rows())
        if winner is None:
            winner = self.plan.winner([row for row, _ in ranked], self.ledger)
        measured = self.plan.baseline in self.ledger.rows()
        return SearchResult(
            best_params=self.space.params(winner),
            best_score=self.ledger.mean(winner),
            baseline_score=self.ledger.mean(self.plan.baseline) if measured else math.nan,
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
