"""The coordinator of a search: ask a batch, measure it on a shared block, tell, and repeat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import optuna
import torch
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mpromptune.attributes import EXAMPLES, N_EXAMPLES, SCORES
from mpromptune.encoding import encode_prompts
from mpromptune.errors import SearchStoppedError
from mpromptune.execution import Outcome, Verdict, Workers
from mpromptune.history import fit_history, read
from mpromptune.result import Measured, SearchResult
from mpromptune.sampler import qEISampler
from mpromptune.samplers import OpenSampler, distributions_of
from mpromptune.schedule import Examples, Schedule
from mpromptune.space import PromptSpace, Row
from mpromptune.surrogate import on_cpu, posterior_mean_and_variance

Callback = Callable[[Study, FrozenTrial], None]
OnCall = Callable[[int, int], None]

# Rounds being measured at any time: while one is being told, the next keeps the workers busy.
_ROUNDS_IN_FLIGHT = 2
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
        schedule: Blocks and budget.
        workers: Score (configuration, example) pairs.
        batch_size: Configurations per round.
        failure_score: What an example scores when the candidate itself failed on it.
        callbacks: Called after every trial, in order.
        on_call: Called as program calls come back.
    """

    space: PromptSpace
    schedule: Schedule
    workers: Workers
    batch_size: int
    failure_score: float
    callbacks: Sequence[Callback]
    on_call: OnCall | None

    def open_study(
        self,
        sampler: BaseSampler,
        seed: int,
        storage: str | optuna.storages.BaseStorage | None,
        study_name: str | None,
    ) -> None:
        """Creates the study, with the sampler bound to the space."""
        self.study = optuna.create_study(
            storage=storage, study_name=study_name, sampler=self._bound(sampler, seed), direction="maximize"
        )
        self.study.set_user_attr(N_EXAMPLES, self.schedule.n_examples)
        self.distributions = distributions_of(self.space)
        self.scores: dict[Row, dict[int, float]] = {}
        self.in_flight: deque[list[_Running]] = deque()
        self.rounds = 0
        self.barren = 0
        self.calls = 0

    def _bound(self, sampler: BaseSampler, seed: int) -> BaseSampler:
        """The sampler made to propose open configurations, and the encoding that judges them."""
        if isinstance(sampler, qEISampler):
            ours = sampler.bound_to(self.space, self.batch_size, self.schedule.is_open)
            self.encoding = ours.prompts() or encode_prompts(self.space, None)
            return ours
        self.encoding = encode_prompts(self.space, None)
        return OpenSampler(sampler, self.space, self.schedule.is_open, seed)

    def run(self) -> SearchResult:
        """Rounds until the budget is spent or nothing is left to measure."""
        try:
            while self._fill():
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
        except (SearchStoppedError, KeyboardInterrupt, SystemExit):
            self._abandon()
            raise
        except BaseException as error:
            self._abandon()
            raise self._stopped("an error outside the program calls", error) from error
        return self._result()

    def _fill(self) -> bool:
        """Starts rounds until enough are in flight; whether any is."""
        while len(self.in_flight) < _ROUNDS_IN_FLIGHT:
            round_: list[_Running] = []
            self.in_flight.append(round_)  # before it is filled: what has started is never lost
            self._explore(round_)
            if not round_:
                self._confirm(round_)
            if not round_:
                self.in_flight.pop()
                break
        return bool(self.in_flight)

    def _explore(self, round_: list[_Running]) -> None:
        """Asks and starts a round of the search proper; none when the budget is kept back."""
        available = self._available()
        for _ in range(self.schedule.size_of_round(self.batch_size, available)):
            first = not self.schedule.assigned.get(self.schedule.baseline)
            if not first and not self.schedule.anything_open(self.space.size):
                break
            left = available - sum(len(running.examples) for running in round_)
            round_.append(self._start(self.schedule.baseline if first else None, left))
        self.rounds += bool(round_)

    def _available(self) -> int:
        """Calls for exploration now; the rest is kept for winner and baseline."""
        cautious = self.schedule.available()
        if cautious >= self.batch_size * len(self.schedule.blocks[0]) or not self.scores:
            return max(cautious, 0)
        return max(self.schedule.available(self._leader()), 0)

    def _confirm(self, round_: list[_Running]) -> None:
        """Measures what winner and baseline still lack, once the last round has been told.

        The baseline's examples do not depend on any result, so they fill the wait.
        """
        if not self.schedule.confirm:
            return
        finalists = [self.schedule.baseline]
        if self.scores and len(self.in_flight) == 1:
            finalists.append(self._leader())
        for row in dict.fromkeys(finalists):
            examples = self.schedule.missing(row)
            if examples:
                round_.append(self._measure(self._ask(row), row, examples))

    def _leader(self) -> Row:
        """The highest posterior mean among what can still be fully measured."""
        rows = [row for row, by in self.scores.items() if by and self.schedule.is_affordable(row)]
        if not rows:
            return self.schedule.baseline
        means, _ = self._posterior(rows)
        return rows[int(means.argmax())]

    def _posterior(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and variance of configurations, given everything told."""
        trials = self.study.get_trials(deepcopy=False)
        with on_cpu():
            history = read(self.study, trials, self.encoding.row, len(self.encoding.names))
            if not len(history):  # every trial so far has failed
                return torch.zeros(len(rows)), torch.ones(len(rows))
            model = fit_history(history, self.encoding.geometries)
            return posterior_mean_and_variance(model, torch.tensor(rows, dtype=torch.float64))

    def _ask(self, row: Row | None) -> Trial:
        if row is not None:
            self.study.enqueue_trial(self.space.params(row))
        return self.study.ask(fixed_distributions=self.distributions)

    def _start(self, row: Row | None, limit: int) -> _Running:
        trial = self._ask(row)
        row = self.space.row(trial.params)
        return self._measure(trial, row, self.schedule.next_examples(row, self.rounds, limit))

    def _measure(self, trial: Trial, row: Row, examples: Examples) -> _Running:
        self.schedule.assign(row, examples)
        trial.set_user_attr(EXAMPLES, list(examples))
        params = self.space.params(row)
        futures = tuple(self.workers.submit(params, example) for example in examples)
        for future in futures:
            future.add_done_callback(self._count)
        return _Running(trial, row, examples, futures)

    def _count(self, future: Future[Outcome]) -> None:
        if not future.cancelled() and self.on_call is not None:
            self.on_call(1, self.schedule.max_calls)

    def _finish(self, round_: list[_Running]) -> None:
        """Waits for a round and tells it in the order in which it was asked."""
        outcomes = [[future.result() for future in running.futures] for running in round_]
        self._require_sense(round_, outcomes)
        for running, results in zip(list(round_), outcomes, strict=True):
            round_.remove(running)  # before the callbacks: what is told is not closed again
            self._tell(running, results)
        if self.schedule.is_dropped(self.schedule.baseline):
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
        many = self.barren >= _BARREN_ROUNDS or len(flat) >= len(self.schedule.blocks[0])
        if None not in verdicts and (several or (self.barren and many)):
            raise self._stopped(f"all {len(flat)} calls of a round failing", _first_error(outcomes))

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        error = SearchStoppedError(
            f"The search stopped on {what}: {type(cause).__name__}: {cause}. "
            f"{self.calls} calls measured before are kept in the study.",
            self.study,
        )
        error.__cause__ = cause
        return error

    def _tell(self, running: _Running, outcomes: Sequence[Outcome]) -> None:
        measured = {o.example: s for o in outcomes if (s := self._score_of(o)) is not None}
        frozen = self._close(running, measured)
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
            self._close(running, {o.example: o.score for o in done if o.score is not None})
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # asked, but never started

    def _close(self, running: _Running, measured: dict[int, float]) -> FrozenTrial:
        """Tells a trial: its mean when every example was measured, FAIL otherwise."""
        self.scores.setdefault(running.row, {}).update(measured)
        self.calls += len(measured)
        self.schedule.release(running.row, [e for e in running.examples if e not in measured])
        running.trial.set_user_attr(EXAMPLES, list(measured))
        running.trial.set_user_attr(SCORES, list(measured.values()))
        if len(measured) < len(running.examples):
            return self.study.tell(running.trial, state=TrialState.FAIL)
        return self.study.tell(running.trial, sum(measured.values()) / len(measured))

    def _result(self) -> SearchResult:
        rows = [row for row, scores in self.scores.items() if scores]
        means, variances = self._posterior(rows)
        table = {
            row: Measured(
                params=self.space.params(row),
                scores=dict(sorted(self.scores[row].items())),
                posterior_mean=float(mean),
                posterior_std=float(variance) ** 0.5,
                fully=len(self.scores[row]) == self.schedule.n_examples,
            )
            for row, mean, variance in zip(rows, means, variances, strict=True)
        }
        ranked = sorted(table.values(), key=lambda m: -m.posterior_mean)
        baseline = table[self.schedule.baseline]
        best = next(m for m in ranked if m.fully or not self.schedule.confirm)
        if self.schedule.confirm and best.mean < baseline.mean:
            best = baseline
        return SearchResult(
            best_params=best.params,
            best_score=best.mean,
            baseline_score=baseline.mean,
            calls=self.calls,
            n_examples=self.schedule.n_examples,
            configurations=tuple(ranked),
            study=self.study,
        )


def _first_error(outcomes: list[list[Outcome]]) -> BaseException | None:
    return next((o.error for results in outcomes for o in results if o.error is not None), None)
