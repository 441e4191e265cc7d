"""The loop of a search: ask a batch, measure it, tell it, and repeat; the plan decides what is asked."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.monitor import Monitor
from mpromptune.engine.outage import Answer, Outage
from mpromptune.engine.plan import Plan, Request
from mpromptune.engine.result import SearchResult
from mpromptune.engine.summary import Summary
from mpromptune.engine.trials import Asked, Running, Trials
from mpromptune.engine.writing import Writing
from mpromptune.errors import SearchInterrupted, SearchStoppedError, reason, stopped
from mpromptune.execution.attempts import FAILURES, Verdict
from mpromptune.execution.interrupts import GRACE, deferred, interrupted, wait_for
from mpromptune.execution.limits import Budget, patience
from mpromptune.execution.pool import Outcome, Workers, is_cut_short, scores_of
from mpromptune.model.space import Examples, PromptSpace
from mpromptune.show.progress import OnProgress
from mpromptune.storage.proposals import Proposal
from mpromptune.storage.record import salvaged

logger = logging.getLogger(__name__)

Callback = Callable[[Study, FrozenTrial], None]

# NOTE: seconds to wait for calls in flight when an error ends the search: they are paid for; one may hang.
_LAST_CALLS = 60.0


@dataclass
class Loop:
    """The loop, in the thread that called `search`: only it asks and tells trials; workers save scores.

    Attributes:
        space: The configurations.
        plan: Decides what is measured next, and the winner.
        workers: Score pairs of configuration and example.
        trials: The trials of the study, those of the record first.
        evidence: The table of scores and the model.
        writing: Makes proposals.
        budget: Limits other than program calls, and the usage that counts against them.
        failure_score: The score of an example on which the candidate failed.
        callbacks: Called after every trial, in order.
        on_progress: Called with the progress of the search.
        grace: Seconds that calls in flight may still take after an interrupt.
    """

    space: PromptSpace
    plan: Plan
    workers: Workers
    trials: Trials
    evidence: Evidence
    writing: Writing
    budget: Budget
    failure_score: float = 0.0
    callbacks: Sequence[Callback] = ()
    on_progress: OnProgress | None = None
    grace: float = GRACE
    in_flight: deque[list[Running]] = field(default_factory=deque)
    unsaved: Exception | None = None

    def __post_init__(self) -> None:
        self.study, self.table = self.trials.study, self.evidence.table
        self.outage = Outage(self.workers.verdict, self.plan.outage)
        self.summary = Summary(self.space, self.plan, self.evidence, self.budget)
        watched = self.plan, self.evidence, self.budget, self.workers, self.trials
        self.monitor = Monitor(self.on_progress, *watched, lambda: sum(f.done() for f in self._futures()))

    def run(self) -> SearchResult:
        """Measure batches until the plan is finished or a limit is reached."""
        try:
            result = self._measure_all()
            self.monitor.finish(result)
            return result
        except (KeyboardInterrupt, SystemExit) as signalled:
            self._abandon(self.grace)
            if isinstance(signalled, KeyboardInterrupt):
                raise self._interrupted(signalled) from None
            raise

    def _measure_all(self) -> SearchResult:
        try:
            while self._fill():
                self.monitor.report()
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
                self.summary.afford()
            self._take_rest()
            if self.budget.reached:  # a call that hangs must spend nothing if it resumes
                self.workers.stopped.set()
            return self.summary.result(self.study)
        except (KeyboardInterrupt, SystemExit):
            raise
        except SearchStoppedError as error:
            raise self._closed(error) from error.__cause__
        except BaseException as error:
            raise self._closed(self._stopped("an error outside the program calls", error)) from error

    # Asking.

    def _fill(self) -> bool:
        """Start batches until enough are in flight; return whether any is."""
        while len(self.in_flight) < self.plan.batches_in_flight and not self.budget.reached:
            batch: list[Running] = []
            self.in_flight.append(batch)  # before it is filled, so that no started trial is lost
            for request in self.plan.next_batch(self.evidence):
                asked = self.trials.next(request.row)
                with deferred():  # an interrupt must not separate a submitted trial from its batch
                    self._start(request, asked, batch)
            if not batch:
                self.in_flight.pop()
                break
        return bool(self.in_flight)

    def _start(self, request: Request, asked: Asked, batch: list[Running]) -> None:
        if asked.proposal is not None:
            self.writing.take(asked.proposal, self.table)
        examples = self._examples(request, asked)
        if not examples:
            self.trials.drop(asked)
            return
        self.table.start(asked.row, examples)
        self.trials.start(asked, examples)
        written: Future[bool] | None = None
        if asked.proposal is not None:
            keep = partial(self._keep_proposal, asked)
            written = self.writing.begin(asked.proposal, self.evidence, self.trials.notes, keep)
        futures = tuple(self._submit(asked, example, written) for example in examples)
        batch.append(Running(asked, examples, futures, written))

    def _examples(self, request: Request, asked: Asked) -> Examples:
        if asked.examples is not None:
            return asked.examples
        if request.row is None and not self.plan.is_open(asked.row):
            return ()  # in a space too large to enumerate, a sampler may find no open configuration
        left = self.plan.task.max_calls - self.table.asked_calls  # no plan spends more
        return request.examples(asked.row, asked.number)[: max(0, left)]

    def _submit(self, asked: Asked, example: int, after: Future[bool] | None) -> Future[Outcome]:
        if asked.trial is not None and example not in asked.scores:
            params = self.space.params(asked.row)
            return self.workers.submit(params, example, partial(self._keep, asked), after)
        measured: Future[Outcome] = Future()
        measured.set_result(Outcome(example, asked.scores.get(example)))
        return measured

    def _keep(self, asked: Asked, outcome: Outcome) -> None:
        """Save a score, or the usage of a failed call, in the worker's thread as soon as the call ends."""
        # A failure gets no score here: only the whole batch shows whether the candidate caused it.
        self._saved(lambda: self.trials.keep(asked, outcome))

    def _keep_proposal(self, asked: Asked, proposal: Proposal) -> None:
        self._saved(lambda: self.trials.keep_proposal(asked, proposal))

    def _saved(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - any error of a storage
            self.unsaved = self.unsaved or error
            self.workers.stopped.set()

    # Waiting.

    def _running(self) -> list[Running]:
        """All trials in flight."""
        return [running for batch in self.in_flight for running in batch]

    def _futures(self) -> list[Future[Outcome]]:
        return [future for running in self._running() for future in running.futures]

    def _await(self, batch: list[Running]) -> None:
        """Wait for a batch; when no call may begin any more, only for a limited time."""
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

    def _answers_in_flight(self) -> tuple[list[Answer], list[Future[Outcome]]]:
        """Answers so far in all batches in flight, and the calls to wait for."""
        calls = [(running.asked.row, future) for running in self._running() for future in running.futures]
        done = [(row, future.result()) for row, future in calls if future.done()]
        return done, [] if self._is_ending() else [future for _, future in calls if not future.done()]

    # Telling.

    def _finish(self, batch: list[Running]) -> None:
        """Wait for a batch, and tell its trials in the order in which they were asked."""
        self._await(batch)
        self._require_running()
        outcomes = [running.outcomes for running in batch]
        self._require_no_outage(batch, outcomes)
        for running, results in zip(list(batch), outcomes, strict=True):
            with deferred():  # an interrupt must not close a trial that is being told
                batch.remove(running)
                frozen = self._tell(running, results)
            if frozen is not None:  # callbacks of trials told by an earlier run were called then
                for callback in self.callbacks:
                    callback(self.study, frozen)
        self.table.batches += 1
        self._require_baseline(outcomes)

    def _require_running(self) -> None:
        """Raise SearchStoppedError if the workers have stopped."""
        unsaved = self.unsaved or self.trials.lease.lost
        if unsaved is not None:
            raise self._stopped("a score that could not be saved", unsaved)
        if self.workers.fatal is not None:
            raise self._stopped("an error that would also fail every further call", self.workers.fatal)
        if self.workers.stopped.is_set():
            raise self._stopped("a request from outside", None)

    def _require_no_outage(self, batch: list[Running], outcomes: list[list[Outcome]]) -> None:
        """Raise SearchStoppedError if a batch shows an outage, or is incomplete without a limit reached."""
        both = zip(batch, outcomes, strict=True)
        paired = [(running, results) for running, results in both if not self._is_refused(running)]
        answers = [(running.asked.row, outcome) for running, results in paired for outcome in results]
        alarm = self.outage.alarm(answers, self._answers_in_flight)
        self._require_running()
        if alarm is not None:
            raise self._stopped(*alarm)
        anew = [results for running, results in paired if running.asked.trial is not None]
        if not self.budget.reached and any(map(is_cut_short, anew)):
            raise self._stopped("a request from outside", None)

    def _require_baseline(self, outcomes: list[list[Outcome]]) -> None:
        """Raise SearchStoppedError if the baseline failed too often and has no score to compare with."""
        baseline = self.plan.task.baseline
        if self.table.is_dropped(baseline) and not self.table.means(baseline):
            error = next((o.error for results in outcomes for o in results if o.error is not None), None)
            if error is not None:
                raise self._stopped("failures of the baseline", error)
            self.table.forgive(baseline)  # the failures are of an earlier run, which stopped on them

    def _tell(self, running: Running, outcomes: Sequence[Outcome]) -> FrozenTrial | None:
        verdicts = {outcome.example: self.workers.verdict(outcome) for outcome in outcomes}
        failed = [example for example, verdict in verdicts.items() if verdict in FAILURES]
        before = running.asked.refused
        refused = [e for e, verdict in verdicts.items() if verdict is Verdict.REFUSED or e in before]
        known = {o.example: o.score for o in outcomes if o.score is not None}
        known.update(dict.fromkeys(failed, self.failure_score))
        scores = {example: known[example] for example in running.examples if example in known}
        is_refused = self._is_refused(running)
        abandoned = running.asked.trial is not None and is_cut_short(outcomes) and not is_refused
        self._book(running, scores, refused, is_over=not abandoned and not is_refused)
        return self.trials.tell(running.asked, running.examples, scores, refused, abandoned)

    def _is_refused(self, running: Running) -> bool:
        return self.writing.is_refused(running.asked.proposal)

    def _book(
        self, running: Running, scores: Mapping[int, float], refused: Sequence[int], is_over: bool
    ) -> None:
        row, used, left_out = running.asked.row, running.asked.meter.total, self.table.unanswerable
        again = self.table.finish(row, running.examples, scores, used, set(refused), is_over)
        if again:
            logger.warning("Configuration %s failed again on validation examples %s.", row, sorted(again))
        if new := sorted(self.table.unanswerable - left_out):
            logger.warning("Most configurations fail on validation examples %s: these are excluded.", new)
        self.budget.note_trial(self.table.usage)
        if running.asked.proposal is not None:
            self.writing.end(running.asked.proposal, self.table)

    def _take_rest(self) -> None:
        """Tell the trials of the record that this run, with a smaller budget, does not ask for."""
        for asked in self.trials.rest():
            running = Running(asked, asked.examples or (), ())
            if asked.proposal is not None:
                self.writing.take(asked.proposal, self.table)
            self.table.start(asked.row, running.examples)
            is_open = asked.trial is not None
            self._book(running, asked.scores, asked.refused, is_over=not is_open)
            self.trials.tell(asked, running.examples, asked.scores, asked.refused, abandoned=is_open)

    # Ending early.

    def _abandon(self, grace: float) -> None:
        """Stop the workers, wait up to ``grace`` seconds, and close all open trials with their scores."""
        self.workers.stopped.set()
        due: list[Future[Any]] = [*self._futures()]
        due += [running.written for running in self._running() if running.written is not None]
        try:
            wait_for([future for future in due if not future.cancel()], grace)
        finally:  # also if another interrupt ends the waiting
            with deferred():
                self._close_all()

    def _close_all(self) -> None:
        running = [(one, scores_of(one.futures)) for one in self._running()]
        self.in_flight.clear()
        for one, scores in running:  # first, so that they count even if the storage fails
            self._book(one, scores, one.asked.refused, is_over=False)
        try:
            for one, scores in running:
                self.trials.tell(one.asked, one.examples, scores, abandoned=True)
            self.trials.abandon_open()
        except Exception as error:  # noqa: BLE001 - any error of a storage
            logger.warning("Open trials could not be closed in the storage (%s); kept in memory.", error)
            try:
                self.study = salvaged(self.study, {one.asked.number: scores for one, scores in running})
            except Exception:
                logger.exception("The storage cannot be read either.")

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        why = "" if cause is None else f": {reason(cause)}"
        return stopped(f"The search stopped because of {what}{why}.", cause, self.study)

    def _closed(self, error: SearchStoppedError) -> SearchStoppedError:
        """The error with the study and the result so far, after closing open trials."""
        self._abandon(_LAST_CALLS)
        kept = f"The study keeps the scores of {self.table.calls} calls; in a storage, it can be continued."
        error.args = (f"{error} {kept}",)
        error.study, error.result = self.study, self.summary.so_far(self.study)
        return error

    def _interrupted(self, signalled: BaseException) -> SearchInterrupted:
        error = interrupted(signalled)(
            f"The search was interrupted; the study keeps the scores of {self.table.calls} calls. "
            "In a storage, the same call continues it. Catch SearchInterrupted to get its `.study`, its "
            "`.result` and, after a compile, `.program`: the best so far.",
            self.study,
            self.summary.so_far(self.study),
        )
        if isinstance(error, SystemExit):  # it would end the interpreter without printing the message
            logger.warning("%s", error)
        return error
