"""The loop of a search: ask a batch, measure it, tell it, and repeat; what and when is the plan's."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.monitor import Monitor
from mpromptune.engine.outage import Answer, Outage
from mpromptune.engine.plan import Plan, Request
from mpromptune.engine.result import SearchResult
from mpromptune.engine.scores import Examples
from mpromptune.engine.summary import Summary
from mpromptune.engine.trials import Asked, Trials
from mpromptune.errors import SearchInterrupted, SearchStoppedError
from mpromptune.execution.attempts import FAILURES, Verdict
from mpromptune.execution.interrupts import GRACE, deferred, interrupted, wait_for
from mpromptune.execution.limits import MEASURE, Budget, patience
from mpromptune.execution.pool import Outcome, Workers, is_cut_short, outcome_of, scores_of
from mpromptune.model.space import PromptSpace
from mpromptune.show.progress import OnProgress
from mpromptune.storage.record import salvaged

logger = logging.getLogger(__name__)

Callback = Callable[[Study, FrozenTrial], None]

# NOTE: seconds that calls in flight have when an error ends the search: they are paid for; one may hang.
_LAST_CALLS = 60.0


@dataclass(frozen=True)
class _Running:
    """A trial whose examples are being measured; what an earlier run has measured is there at once."""

    asked: Asked
    examples: Examples
    futures: tuple[Future[Outcome], ...]

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome_of(e, future) for e, future in zip(self.examples, self.futures, strict=True)]


@dataclass
class Loop:
    """The one thread that talks to the study; workers only score, and save what they have scored.

    Attributes:
        space: The configurations.
        plan: What is measured next, and who wins.
        workers: Score (configuration, example) pairs.
        trials: The trials of the study: the record of earlier runs first.
        evidence: The table of scores, and what was learnt.
        budget: Limits beside program calls, and what counts against them.
        failure_score: What an example scores when the candidate itself failed on it.
        callbacks: Called after every trial, in order.
        on_progress: Told how the search stands.
        grace: Seconds that an interrupt leaves to calls in flight.
    """

    space: PromptSpace
    plan: Plan
    workers: Workers
    trials: Trials
    evidence: Evidence
    budget: Budget
    failure_score: float = 0.0
    callbacks: Sequence[Callback] = ()
    on_progress: OnProgress | None = None
    grace: float = GRACE
    in_flight: deque[list[_Running]] = field(default_factory=deque)
    unsaved: Exception | None = None

    def __post_init__(self) -> None:
        self.study, self.table = self.trials.study, self.evidence.table
        self.outage = Outage(self.workers.verdict, self.plan.outage)
        self.summary = Summary(self.space, self.plan, self.evidence, self.budget)
        watched = self.plan, self.evidence, self.budget, self.workers, self.trials
        self.monitor = Monitor(self.on_progress, *watched, lambda: sum(f.done() for f in self._futures()))

    def run(self) -> SearchResult:
        """Batches until the plan has no more, or a limit is used up."""
        try:
            self._measure_all()
            result = self.summary.result(self.study)
            self.monitor.finish(result)
            return result
        except (KeyboardInterrupt, SystemExit) as signalled:
            self._abandon(self.grace)
            if isinstance(signalled, KeyboardInterrupt):
                raise self._interrupted(signalled) from signalled
            raise

    def _measure_all(self) -> None:
        try:
            while self._fill():
                self.monitor.report()
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
                self._afford()
            self._take_rest()
            if self.budget.reached:  # a call that hangs is to spend nothing when it wakes up
                self.workers.stopped.set()
        except (KeyboardInterrupt, SystemExit):
            raise
        except SearchStoppedError as error:
            raise self._closed(error) from error.__cause__
        except BaseException as error:
            raise self._closed(self._stopped("an error outside the program calls", error)) from error

    # Asking.

    def _fill(self) -> bool:
        """Starts batches until enough are in flight; whether any is."""
        while len(self.in_flight) < self.plan.batches_in_flight and not self.budget.reached:
            batch: list[_Running] = []
            self.in_flight.append(batch)  # before it is filled: what has started is never lost
            for request in self.plan.next_batch(self.evidence):
                asked = self.trials.next(request.row)
                with deferred():  # what has been submitted is to be found in its batch
                    self._start(request, asked, batch)
            if not batch:
                self.in_flight.pop()
                break
        return bool(self.in_flight)

    def _start(self, request: Request, asked: Asked, batch: list[_Running]) -> None:
        examples = self._examples(request, asked)
        if not examples:
            self.trials.drop(asked)
            return
        self.table.start(asked.row, examples)
        self.trials.start(asked, examples)
        batch.append(_Running(asked, examples, tuple(self._submit(asked, example) for example in examples)))

    def _examples(self, request: Request, asked: Asked) -> Examples:
        if asked.examples is not None:
            return asked.examples
        if request.row is None and not self.plan.is_open(asked.row):
            return ()  # in a space too large to list, a sampler may find nothing open
        return request.examples(asked.row, asked.number)

    def _submit(self, asked: Asked, example: int) -> Future[Outcome]:
        if asked.trial is not None and example not in asked.scores:
            params = self.space.params(asked.row)
            return self.workers.submit(params, example, partial(self._keep, asked))
        measured: Future[Outcome] = Future()
        measured.set_result(Outcome(example, asked.scores.get(example)))
        return measured

    def _keep(self, asked: Asked, outcome: Outcome) -> None:
        """Saves a score in the worker that has it: it is paid for, whatever comes next.

        What a candidate failed on is not known to be its own fault before its batch is complete.
        """
        try:
            self.trials.keep(asked, outcome.example, outcome.score, outcome.usage)
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self.unsaved = self.unsaved or error
            self.workers.stopped.set()

    # Waiting.

    def _running(self) -> list[_Running]:
        """All trials that are being measured."""
        return [running for batch in self.in_flight for running in batch]

    def _futures(self) -> list[Future[Outcome]]:
        return [future for running in self._running() for future in running.futures]

    def _await(self, batch: list[_Running]) -> None:
        """Waits for a batch; once no call may begin, not for good for one that hangs."""
        calls = [future for running in batch for future in running.futures]
        wait_for(calls, unless=self._is_ending, meanwhile=self._look)
        if self.budget.reached:
            wait_for(self._futures(), unless=self.workers.stopped.is_set, meanwhile=self._look)

    def _look(self) -> None:
        used = [future.result().usage for future in self._futures() if future.done()]
        known = sum(used, self.table.usage), self.table.calls + len(used)
        self.budget.patience = patience(*known, least=self.grace, most=_LAST_CALLS)
        self.monitor.beat()

    def _is_ending(self) -> bool:
        return self.workers.stopped.is_set() or self.budget.reached is not None

    def _in_hand(self) -> tuple[list[Answer], list[Future[Outcome]]]:
        """Answers of all batches in flight, and calls that are worth waiting for."""
        calls = [(running.asked.row, future) for running in self._running() for future in running.futures]
        done = [(row, future.result()) for row, future in calls if future.done()]
        return done, [] if self._is_ending() else [future for _, future in calls if not future.done()]

    # Telling.

    def _finish(self, batch: list[_Running]) -> None:
        """Waits for a batch and tells it in the order in which it was asked."""
        self._await(batch)
        self._require_going()
        outcomes = [running.outcomes for running in batch]
        self._require_sense(batch, outcomes)
        for running, results in zip(list(batch), outcomes, strict=True):
            with deferred():  # what is told is not closed again
                batch.remove(running)
                frozen = self._tell(running, results)
            if frozen is not None:  # told by this run: an earlier one has called back itself
                for callback in self.callbacks:
                    callback(self.study, frozen)
        self.table.batches += 1
        self._require_baseline(outcomes)

    def _require_going(self) -> None:
        """Stops where the workers have stopped."""
        unsaved = self.unsaved or self.trials.lease.lost
        if unsaved is not None:
            raise self._stopped("a score that could not be saved", unsaved)
        if self.workers.fatal is not None:
            raise self._stopped("an error that no further call can mend", self.workers.fatal)
        if self.workers.stopped.is_set():
            raise self._stopped("being told to from outside", None)

    def _require_sense(self, batch: list[_Running], outcomes: list[list[Outcome]]) -> None:
        """Stops where a batch's answers are not to be told."""
        paired = list(zip(batch, outcomes, strict=True))
        answers = [(running.asked.row, outcome) for running, results in paired for outcome in results]
        alarm = self.outage.alarm(answers, self._in_hand)
        self._require_going()
        if alarm is not None:
            raise self._stopped(*alarm)
        anew = [results for running, results in paired if running.asked.trial is not None]
        if not self.budget.reached and any(map(is_cut_short, anew)):
            raise self._stopped("being told to from outside", None)

    def _require_baseline(self, outcomes: list[list[Outcome]]) -> None:
        """Stops where the baseline has failed too often, and was never answered: nothing to compare with."""
        baseline = self.plan.task.baseline
        if self.table.is_dropped(baseline) and not self.table.means(baseline):
            error = next((o.error for results in outcomes for o in results if o.error is not None), None)
            if error is not None:
                raise self._stopped("the baseline's trials failing", error)
            self.table.forgive(baseline)  # it was an earlier run that stopped on them

    def _tell(self, running: _Running, outcomes: Sequence[Outcome]) -> FrozenTrial | None:
        verdicts = {outcome.example: self.workers.verdict(outcome) for outcome in outcomes}
        failed = [example for example, verdict in verdicts.items() if verdict in FAILURES]
        before = running.asked.refused
        refused = [e for e, verdict in verdicts.items() if verdict is Verdict.REFUSED or e in before]
        known = {o.example: o.score for o in outcomes if o.score is not None}
        known.update(dict.fromkeys(failed, self.failure_score))
        scores = {example: known[example] for example in running.examples if example in known}
        abandoned = running.asked.trial is not None and is_cut_short(outcomes)
        self._book(running, scores, refused, is_over=not abandoned)
        return self.trials.tell(running.asked, running.examples, scores, refused, abandoned)

    def _book(
        self, running: _Running, scores: Mapping[int, float], refused: Sequence[int], is_over: bool
    ) -> None:
        row, used, left_out = running.asked.row, running.asked.meter.total, self.table.unanswerable
        again = self.table.finish(row, running.examples, scores, used, set(refused), is_over)
        if again:
            logger.warning("Configuration %s failed again on validation examples %s.", row, sorted(again))
        if new := sorted(self.table.unanswerable - left_out):
            logger.warning("Validation examples %s fail for most configurations, and are left out.", new)
        self.budget.note_trial(self.table.usage)

    def _take_rest(self) -> None:
        """Tells what a run with a larger budget measured, and this one does not ask for."""
        for asked in self.trials.rest():
            running = _Running(asked, asked.examples or (), ())
            self.table.start(asked.row, running.examples)
            is_open = asked.trial is not None
            self._book(running, asked.scores, asked.refused, is_over=not is_open)
            self.trials.tell(asked, running.examples, asked.scores, asked.refused, abandoned=is_open)

    def _afford(self) -> None:
        """Tells the plan how far tokens, money and time go, so that it can keep back what it needs."""
        table, max_calls = self.table, self.plan.task.max_calls
        left = self.budget.calls_left(table.usage, table.calls)
        if left is None:
            return
        name, calls = left
        price = partial(table.relative_use, MEASURE[name])
        dearest = max(map(price, table.rows), default=1.0)
        if calls >= dearest * (max_calls - table.calls):  # enough, come what may
            self.summary.binding = None
            self.plan.afford(max_calls, lambda row: 1.0)
        else:
            self.summary.binding = name if table.calls + calls < max_calls else None
            self.plan.afford(table.calls + calls, price)

    # Ending early.

    def _abandon(self, grace: float) -> None:
        """Stops the workers and closes every open trial, keeping the scores that come in until then."""
        self.workers.stopped.set()
        try:
            wait_for([future for future in self._futures() if not future.cancel()], grace)
        finally:  # another interrupt ends the waiting, and leaves no trial open either
            with deferred():
                self._close_all()

    def _close_all(self) -> None:
        running = [(one, scores_of(one.futures)) for one in self._running()]
        self.in_flight.clear()
        for one, scores in running:  # first, so that they count even where the storage fails
            self._book(one, scores, one.asked.refused, is_over=False)
        try:
            for one, scores in running:
                self.trials.tell(one.asked, one.examples, scores, abandoned=True)
            self.trials.abandon_open()
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            logger.warning("Open trials could not be closed in the storage (%s); kept in memory.", error)
            try:
                self.study = salvaged(self.study, {one.asked.number: scores for one, scores in running})
            except Exception:
                logger.exception("Nor can the storage be read.")

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        why = "" if cause is None else f": {type(cause).__name__}: {cause}"
        error = SearchStoppedError(f"The search stopped on {what}{why}.", self.study)
        error.__cause__ = cause
        return error

    def _closed(self, error: SearchStoppedError) -> SearchStoppedError:
        """The error with all that was measured, once the last calls have come back."""
        self._abandon(_LAST_CALLS)
        error.args = (f"{error} {self.table.calls} calls measured before are kept in the study.",)
        error.study, error.result = self.study, self.summary.so_far(self.study)
        return error

    def _interrupted(self, signalled: BaseException) -> SearchInterrupted:
        error = interrupted(signalled)(
            f"The search was interrupted; {self.table.calls} calls measured before are kept in the study. "
            "What is caught as SearchInterrupted has `.study`, `.result` and, after a compile, `.program`: "
            "the best so far.",
            self.study,
            self.summary.so_far(self.study),
        )
        if isinstance(error, SystemExit):  # which ends the interpreter without a word
            logger.warning("%s", error)
        return error
