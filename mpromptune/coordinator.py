"""The coordinator of a search: ask a round, measure it, tell, and repeat; what and when is the plan's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mpromptune.attributes import EXAMPLES, SCORES, USAGE
from mpromptune.errors import SearchStoppedError
from mpromptune.execution import Outcome, Verdict, Workers
from mpromptune.knowledge import Knowledge
from mpromptune.limits import MEASURE, Budget
from mpromptune.plan import Plan, Request
from mpromptune.result import Measured, SearchResult
from mpromptune.samplers import distributions_of
from mpromptune.schedule import Examples
from mpromptune.space import PromptSpace, Row
from mpromptune.usage import Usage

Callback = Callable[[Study, FrozenTrial], None]
OnCall = Callable[[int, int], None]

# Small rounds in a row without a single answer that are read as an outage.
_BARREN_ROUNDS = 10


@dataclass(frozen=True)
class _Running:
    """A trial whose examples are being measured."""

    trial: Trial
    row: Row
    examples: Examples
    futures: tuple[Future[Outcome], ...]


class _LimitReached(Exception):  # noqa: N818 - a signal, not an error
    """Work items were refused because a limit is used up."""


@dataclass
class Coordinator:
    """The one thread that talks to the study; workers only score.

    Attributes:
        space: The configurations.
        plan: What is measured next, and who wins.
        workers: Score (configuration, example) pairs.
        known: The study, and what was learnt.
        budget: Limits beside program calls, and what counts against them.
        failure_score: What an example scores when the candidate itself failed on it.
        callbacks: Called after every trial, in order.
        on_call: Called as program calls come back.
    """

    space: PromptSpace
    plan: Plan
    workers: Workers
    known: Knowledge
    budget: Budget
    failure_score: float
    callbacks: Sequence[Callback]
    on_call: OnCall | None
    in_flight: deque[list[_Running]] = field(default_factory=deque)
    barren: int = 0
    binding: str | None = None  # the limit that leaves fewer calls than the plan has

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
                self._afford()
        except _LimitReached:
            self._abandon()
        except (SearchStoppedError, KeyboardInterrupt, SystemExit):
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

    def _ask(self, row: Row | None) -> Trial:
        if row is not None:
            self.study.enqueue_trial(self.space.params(row))
        return self.study.ask(fixed_distributions=self.distributions)

    def _start(self, request: Request, round_: list[_Running]) -> None:
        trial = self._ask(request.row)
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
        outcomes = [[future.result() for future in running.futures] for running in round_]
        self._require_sense(round_, outcomes)
        if self.budget.reached:
            raise _LimitReached
        for running, results in zip(list(round_), outcomes, strict=True):
            round_.remove(running)  # before the callbacks: what is told is not closed again
            self._tell(running, results)
        self.ledger.rounds += 1
        if self.plan.is_dropped(self.plan.baseline):
            raise self._stopped("the baseline's trials failing", _first_error(outcomes))

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
        frozen = self._close(running, measured, _usage(outcomes))
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
        for running in open_trials:
            done = [f.result() for f in running.futures if not f.cancelled() and not f.exception()]
            self._close(running, {o.example: o.score for o in done if o.score is not None}, _usage(done))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # asked, but never started

    def _close(self, running: _Running, measured: dict[int, float], usage: Usage) -> FrozenTrial:
        """Tells a trial: its mean when every example was measured, FAIL otherwise."""
        self.ledger.add(running.row, measured, usage)
        lost = [example for example in running.examples if example not in measured]
        self.plan.settle(running.row, running.examples, lost)
        running.trial.set_user_attr(EXAMPLES, list(measured))
        running.trial.set_user_attr(SCORES, list(measured.values()))
        running.trial.set_user_attr(USAGE, json.dumps(usage.as_dict()))
        if len(measured) < len(running.examples):
            return self.study.tell(running.trial, state=TrialState.FAIL)
        return self.study.tell(running.trial, sum(measured.values()) / len(measured))

    def _afford(self) -> None:
        """Tells the plan how far tokens, money and time go, so that it can keep back what it needs."""
        left = self.budget.calls_left(self.ledger.usage, self.ledger.calls)
        if left is None:
            return
        name, calls = left
        price = partial(self.ledger.relative_use, MEASURE[name])
        dearest = max(map(price, self.ledger.rows()), default=1.0)
        if calls >= dearest * (self.plan.max_calls - self.ledger.calls):  # enough, come what may
            self.binding = None
            self.plan.afford(self.plan.max_calls, lambda row: 1.0)
        else:
            affordable = self.ledger.calls + calls
            self.binding = name if affordable < self.plan.max_calls else None
            self.plan.afford(affordable, price)

    def _winner(self, ranked: list[Row]) -> Row:
        """The plan's, unless a limit cut it short; the plan may then not have got to its winner."""
        stopped_by = self.budget.reached or self.binding
        if stopped_by is None:
            return self.plan.winner(ranked, self.ledger)
        if not ranked:
            raise SearchStoppedError(
                f"{stopped_by} was reached before anything was measured: {self.budget.usage.total}.",
                self.study,
            )
        return self.plan.best_so_far(ranked, self.ledger)

    def _result(self) -> SearchResult:
        ranked = self.known.best_first(self.ledger.rows())
        winner = self._winner([row for row, _ in ranked])
        return SearchResult(
            best_params=self.space.params(winner),
            best_score=self.ledger.mean(winner),
            baseline_score=self.ledger.mean(self.plan.baseline),
            calls=self.ledger.calls,
            n_examples=self.plan.n_examples,
            configurations=tuple(self._measured([row for row, _ in ranked])),
            study=self.study,
            usage=self.budget.usage,
            stopped_by=self.budget.reached or self.binding,
            overspent=self.budget.overspent,
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


def _usage(outcomes: Sequence[Outcome]) -> Usage:
    return sum((outcome.usage for outcome in outcomes), Usage())
