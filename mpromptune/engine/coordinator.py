"""The coordinator of a search: ask a round, measure it, tell, and repeat; what and when is the plan's."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.monitor import Monitor
from mpromptune.engine.plan import Plan, Request
from mpromptune.engine.result import SearchResult
from mpromptune.engine.summary import Summary
from mpromptune.engine.trials import Asked, Trials
from mpromptune.errors import SearchInterrupted, SearchStoppedError
from mpromptune.execution.attempts import FAILURES, Verdict
from mpromptune.execution.health import Health
from mpromptune.execution.interrupts import GRACE, deferred, interrupted, wait_for
from mpromptune.execution.limits import MEASURE, Budget, patience
from mpromptune.execution.outage import Answer
from mpromptune.execution.pool import Outcome, Workers, is_cut_short, outcome_of, scores_of
from mpromptune.model.space import PromptSpace, Row
from mpromptune.show.progress import OnProgress
from mpromptune.storage.ledger import Examples
from mpromptune.storage.record import salvaged

logger = logging.getLogger(__name__)

Callback = Callable[[Study, FrozenTrial], None]

# NOTE: seconds that calls in flight are given when an error, not a user, ends the search: they are
# paid for, so nearly all of them are worth waiting for; one that hangs is not.
_LAST_CALLS = 60.0


@dataclass(frozen=True)
class _Running:
    """A trial whose examples are being measured; what an earlier run has measured is there at once."""

    asked: Asked
    examples: Examples
    futures: tuple[Future[Outcome], ...]

    @property
    def row(self) -> Row:
        return self.asked.row

    @property
    def calls(self) -> Iterator[tuple[int, Future[Outcome]]]:
        return zip(self.examples, self.futures, strict=True)


@dataclass
class Coordinator:
    """The one thread that talks to the study; workers only score, and save what they have scored.

    Attributes:
        space: The configurations.
        plan: What is measured next, and who wins.
        workers: Score (configuration, example) pairs.
        trials: The trials of the study: the record of earlier runs first.
        known: The study, and what was learnt.
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
    known: Knowledge
    budget: Budget
    failure_score: float
    callbacks: Sequence[Callback]
    on_progress: OnProgress | None
    grace: float = GRACE
    in_flight: deque[list[_Running]] = field(default_factory=deque)
    unsaved: Exception | None = None

    def __post_init__(self) -> None:
        self.study = self.known.study
        self.ledger = self.known.ledger
        self.health = Health(self.workers.verdict, self.plan.outage)
        self.summary = Summary(self.space, self.plan, self.known, self.budget)
        watched = self.plan, self.known, self.budget, self.workers, self.trials
        self.monitor = Monitor(self.on_progress, *watched, lambda: sum(f.done() for f in self._futures()))

    def run(self) -> SearchResult:
        """Rounds until the plan has no more, or a limit is used up."""
        try:
            self._measure_all()
            result = self.summary.result(self.study)
            self.monitor.finish(result)
            return result
        except KeyboardInterrupt as signalled:
            self._abandon(self.grace)
            raise self._interrupted(signalled) from signalled
        except SystemExit:
            self._abandon(self.grace)
            raise

    def _measure_all(self) -> None:
        try:
            while self._fill():
                self.monitor.report()
                self._finish(self.in_flight[0])
                self.in_flight.popleft()
                self._afford()
            self._take_rest()
            if self.budget.reached:
                self.workers.stopped.set()  # a call that hangs is to spend nothing when it wakes up
        except (KeyboardInterrupt, SystemExit):
            raise
        except SearchStoppedError as error:
            raise self._closed(error) from error.__cause__
        except BaseException as error:
            raise self._closed(self._stopped("an error outside the program calls", error)) from error

    def _fill(self) -> bool:
        """Starts rounds until enough are in flight; whether any is."""
        while len(self.in_flight) < self.plan.rounds_in_flight and not self.budget.reached:
            round_: list[_Running] = []
            self.in_flight.append(round_)  # before it is filled: what has started is never lost
            for request in self.plan.next_round(self.known, alone=len(self.in_flight) == 1):
                asked = self.trials.next(request.row)
                with deferred():  # what has been submitted is to be found in its round
                    self._start(request, asked, round_)
            if not round_:
                self.in_flight.pop()
                break
        return bool(self.in_flight)

    def _start(self, request: Request, asked: Asked, round_: list[_Running]) -> None:
        examples = self._examples(request, asked)
        if not examples:
            self.trials.drop(asked)
            return
        self.plan.assign(asked.row, examples)
        self.trials.start(asked, examples)
        futures = tuple(self._submit(asked, example) for example in examples)
        round_.append(_Running(asked, examples, futures))

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
        if example not in asked.scores:
            self.health.recall(asked.row, example)
        measured: Future[Outcome] = Future()
        measured.set_result(Outcome(example, asked.scores.get(example)))
        return measured

    def _keep(self, asked: Asked, outcome: Outcome) -> None:
        """Saves a score in the worker that has it: it is paid for, whatever comes next.

        What a candidate failed on is not known to be its own fault before its round is complete.
        """
        try:
            self.trials.keep(asked, outcome.example, outcome.score, outcome.usage)
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self.unsaved = self.unsaved or error
            self.workers.stopped.set()

    def _finish(self, round_: list[_Running]) -> None:
        """Waits for a round and tells it in the order in which it was asked."""
        self._await(round_)
        self._require_going()
        outcomes = [[outcome_of(*call) for call in running.calls] for running in round_]
        self._require_sense(round_, outcomes)
        for running, results in zip(list(round_), outcomes, strict=True):
            with deferred():  # what is told is not closed again
                round_.remove(running)
                frozen = self._tell(running, results)
            if frozen is not None:  # told by this run: an earlier one has called back itself
                for callback in self.callbacks:
                    callback(self.study, frozen)
        self.ledger.rounds += 1
        if self.plan.is_stuck(self.ledger):
            error = next((o.error for results in outcomes for o in results if o.error is not None), None)
            if error is not None:
                raise self._stopped("the baseline's trials failing", error)
            self.plan.forgive(self.plan.baseline)  # it was an earlier run that stopped on them

    def _await(self, round_: list[_Running]) -> None:
        """Waits for a round; once no call may begin, not for good for one that hangs."""
        calls = [future for running in round_ for future in running.futures]
        wait_for(calls, unless=self._is_ending, meanwhile=self._look)
        if self.budget.reached:
            wait_for(self._futures(), unless=self.workers.stopped.is_set, meanwhile=self._look)

    def _look(self) -> None:
        used = [future.result().usage for future in self._futures() if future.done()]
        known = sum(used, self.ledger.usage), self.ledger.calls + len(used)
        self.budget.patience = patience(*known, least=self.grace, most=_LAST_CALLS)
        self.monitor.beat()

    def _futures(self) -> list[Future[Outcome]]:
        return [future for running in self._running() for future in running.futures]

    def _is_ending(self) -> bool:
        return self.workers.stopped.is_set() or self.budget.reached is not None

    def _require_going(self) -> None:
        """Stops where the workers have stopped."""
        unsaved = self.unsaved or self.trials.lease.lost
        if unsaved is not None:
            raise self._stopped("a score that could not be saved", unsaved)
        if self.workers.fatal is not None:
            raise self._stopped("an error that no further call can mend", self.workers.fatal)
        if self.workers.stopped.is_set():
            raise self._stopped("being told to from outside", None)

    def _require_sense(self, round_: list[_Running], outcomes: list[list[Outcome]]) -> None:
        """Stops where a round's answers are not to be told."""
        mine = [(r.row, outcome) for r, results in zip(round_, outcomes, strict=True) for outcome in results]
        alarm = self.health.check(mine, self._in_hand)
        self._require_going()
        if alarm is not None:
            raise self._stopped(alarm.what, alarm.cause)
        anew = [results for r, results in zip(round_, outcomes, strict=True) if r.asked.trial is not None]
        if not self.budget.reached and any(map(is_cut_short, anew)):
            raise self._stopped("being told to from outside", None)

    def _running(self) -> Iterator[_Running]:
        """All trials that are being measured."""
        for round_ in self.in_flight:
            yield from round_

    def _in_hand(self) -> tuple[list[Answer], list[Future[Outcome]]]:
        """Answers of all rounds in flight, and calls that are worth waiting for."""
        calls = [(running.row, future) for running in self._running() for future in running.futures]
        done = [(row, future.result()) for row, future in calls if future.done()]
        return done, [] if self._is_ending() else [future for _, future in calls if not future.done()]

    def _stopped(self, what: str, cause: BaseException | None) -> SearchStoppedError:
        self.workers.stopped.set()
        why = "" if cause is None else f": {type(cause).__name__}: {cause}"
        error = SearchStoppedError(f"The search stopped on {what}{why}.", self.study)
        error.__cause__ = cause
        return error

    def _closed(self, error: SearchStoppedError) -> SearchStoppedError:
        """The error with all that was measured, once the last calls have come back."""
        self._abandon(_LAST_CALLS)
        error.args = (f"{error} {self.ledger.calls} calls measured before are kept in the study.",)
        error.study, error.result = self.study, self.summary.so_far(self.study)
        return error

    def _interrupted(self, signalled: BaseException) -> SearchInterrupted:
        error = interrupted(signalled)(
            f"The search was interrupted; {self.ledger.calls} calls measured before are kept in the study. "
            "What is caught as SearchInterrupted has `.study`, `.result` and, after a compile, `.program`: "
            "the best so far.",
            self.study,
            self.summary.so_far(self.study),
        )
        if isinstance(error, SystemExit):  # which ends the interpreter without a word
            logger.warning("%s", error)
        return error

    def _tell(self, running: _Running, outcomes: Sequence[Outcome]) -> FrozenTrial | None:
        failed = [o.example for o in outcomes if self.workers.verdict(o) in FAILURES]
        refused = tuple(o.example for o in outcomes if self.workers.verdict(o) is Verdict.REFUSED)
        if refused:
            running = replace(running, asked=replace(running.asked, refused=refused))
        measured = {o.example: o.score for o in outcomes if o.score is not None}
        measured.update(dict.fromkeys(failed, self.failure_score))
        in_order = {example: measured[example] for example in running.examples if example in measured}
        return self._close(running, in_order, running.asked.trial is not None and is_cut_short(outcomes))

    def _abandon(self, grace: float) -> None:
        """Stops the workers and closes every open trial, keeping the scores that come in until then."""
        self.workers.stopped.set()
        try:
            wait_for([future for future in self._futures() if not future.cancel()], grace)
        finally:  # another interrupt ends the waiting, and leaves no trial open either
            with deferred():
                self._close_all()

    def _close_all(self) -> None:
        running = list(self._running())
        scores = {r.asked.number: scores_of(r.futures) for r in running}
        self.in_flight.clear()
        for one in running:  # first, so that they count even where the storage fails
            self._book(one, scores[one.asked.number])
        try:
            for one in running:
                self.trials.tell(one.asked, one.examples, scores[one.asked.number], abandoned=True)
            self.trials.abandon_open()
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self._leave_storage(error, scores)

    def _leave_storage(self, error: Exception, measured: Mapping[int, Mapping[int, float]]) -> None:
        logger.warning("Open trials could not be closed in the storage (%s); kept in memory.", error)
        try:
            self.study = salvaged(self.study, measured)
        except Exception:
            logger.exception("Nor can the storage be read.")

    def _close(
        self, running: _Running, measured: Mapping[int, float], abandoned: bool = False
    ) -> FrozenTrial | None:
        self._book(running, measured, is_over=not abandoned)
        return self.trials.tell(running.asked, running.examples, measured, abandoned)

    def _book(self, running: _Running, measured: Mapping[int, float], is_over: bool = False) -> None:
        lost = [example for example in running.examples if example not in measured]
        asked = running.asked
        self.ledger.add(asked.row, measured, asked.meter.total, lost if is_over else (), asked.refused)
        self.budget.note_trial(self.ledger.usage)
        self.plan.settle(running.row, running.examples, lost)

    def _take_rest(self) -> None:
        """Tells what a run with a larger budget measured, and this one does not ask for."""
        for asked in self.trials.rest():
            examples = asked.examples or ()
            self.plan.assign(asked.row, examples)
            self._close(_Running(asked, examples, ()), asked.scores, abandoned=asked.trial is not None)

    def _afford(self) -> None:
        """Tells the plan how far tokens, money and time go, so that it can keep back what it needs."""
        left = self.budget.calls_left(self.ledger.usage, self.ledger.calls)
        if left is None:
            return
        name, calls = left
        price = partial(self.ledger.relative_use, MEASURE[name])
        dearest = max(map(price, self.ledger.rows()), default=1.0)
        if calls >= dearest * (self.plan.max_calls - self.ledger.calls):  # enough, come what may
            self.summary.binding = None
            self.plan.afford(self.plan.max_calls, lambda row: 1.0)
        else:
            affordable = self.ledger.calls + calls
            self.summary.binding = name if affordable < self.plan.max_calls else None
            self.plan.afford(affordable, price)
