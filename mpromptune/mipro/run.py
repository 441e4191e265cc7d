"""A running compile: the state that its three steps share, their threads, and the first score."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import dspy
from optuna.storages import BaseStorage
from optuna.study import Study

from mpromptune.engine.options import SearchOptions
from mpromptune.errors import SearchInterrupted, SearchStoppedError, reason, stopped
from mpromptune.execution.attempts import INFRASTRUCTURE, Attempts, RetryPolicy, Verdict
from mpromptune.execution.interrupts import Stopped, check_stopped, interrupted, is_over, result_of, stoppable
from mpromptune.execution.limits import SEARCH, Budget
from mpromptune.execution.pool import DaemonThreads, Score
from mpromptune.execution.remote import Workplace
from mpromptune.execution.usage import StepUsage, Usage, record
from mpromptune.lms.adapters import keeping, reusing
from mpromptune.lms.errors import classify, retry_after
from mpromptune.lms.guard import Guard
from mpromptune.lms.metering import Pricing, measured
from mpromptune.mipro.checkpoint import Checkpoint
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace, scorer
from mpromptune.mipro.estimate import interceptor
from mpromptune.mipro.fingerprint import Part
from mpromptune.mipro.metric import CheckedMetric
from mpromptune.mipro.results import Evaluations
from mpromptune.show.repeats import repeats_hidden
from mpromptune.show.screens import choose
from mpromptune.show.view import View
from mpromptune.storage.lease import Lease, held

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """A running compile with options.

    Attributes:
        optimizer: The ``dspy.MIPROv2``; random draws from its ``rng`` are the same as DSPy's.
        student: The program.
        options: The options of m-promptune.
        arguments: The arguments of ``dspy.MIPROv2.compile``, with defaults.
        seed: Seed of the whole compile.
        num_threads: Program calls made at the same time.
        budget: The limits, and the usage of each step.
        guard: Watches the LM requests.
        threads: Make the calls of the steps before the search.
        place: The executor that runs the programs of the search.
        metric: The optimizer's metric; if it is broken, no further call begins.
        view: Shows the progress of all three steps.
        evaluations: Reports the search to DSPy's callbacks.
        checkpoint: The results saved in the storage, if there is one.
        proposer: Proposes instructions; None before its first request.
        num_instructions: Number of instructions for each predictor.
        trainset: The training examples; from the first step on without those that DSPy validates on.
        most_written: Most LM requests of proposals during the search.
        estimated: Most usage of each step.
        first: The validation examples, and the index of the one that the search begins with.
    """

    def __init__(
        self, optimizer: Any, student: Any, options: SearchOptions, arguments: Mapping[str, Any]
    ) -> None:
        self.optimizer, self.student, self.options, self.arguments = optimizer, student, options, arguments
        seed = arguments.get("seed")
        self.seed = int(optimizer.seed if seed is None else seed)
        self.num_threads = int(optimizer.num_threads or dspy.settings.num_threads) * options.n_jobs
        self.budget = Budget(options.limits, grace=options.grace)
        pricing = Pricing(options.prices, must_know=options.max_cost is not None)
        self.guard = Guard(self.budget, pricing, pace=options.pace)
        self.threads = pool = Threads(self.num_threads, options.retry, self.budget.admits)
        self.place = Workplace(None if options.dry_run else options.executor)
        self.metric = CheckedMetric(optimizer.metric, pool.stop)
        screen, load = choose if options.verbose else lambda: None, lambda: pool.attempts.load
        self.view = View(screen, self.budget, load, next_step=interceptor().next_step)
        self.evaluations = Evaluations(optimizer.metric)
        self.checkpoint: Checkpoint | None = None
        self.proposer: Any = None
        self.num_instructions = 0  # set, as is the budget, when DSPy has determined the size of the run
        self.trainset: Sequence[Any] = arguments.get("trainset") or ()
        self.most_written = 0
        self.estimated = StepUsage()
        self.first: tuple[list[Any], int] | None = None
        self._first: FirstScore | None = None
        self._lease: Lease | None = None
        self._open = ExitStack()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A context in which all resources of the steps are open; errors get the program and the usage."""
        try:
            with repeats_hidden, self.budget.ending(), self.guard.watching(), self._open, self.place:
                try:
                    yield
                finally:
                    self.guard.stopped.set()  # calls in flight make no further LM call
                    try:
                        self.threads.close(self.options.grace)
                    finally:
                        self.view.close()
        except (SearchInterrupted, SearchStoppedError) as error:
            error.program = self.student if error.program is None else error.program
            error.usage = self.budget.usage
            raise
        except KeyboardInterrupt as signalled:
            kept = (
                "" if self.checkpoint is None else " What is in the storage is kept; the same call continues."
            )
            outside = interrupted(signalled)(f"The compile was interrupted outside its search.{kept}")
            outside.program, outside.usage = self.student, self.budget.usage
            raise outside from None

    def resume(self, study: Study, run: Mapping[str, Part]) -> None:
        """Load the checkpoint of an interrupted run from the study, and save the results of this run there.

        Raises:
            StudyInUseError: Another run uses the study.
            StudyMismatchError: The study belongs to another run, with another ``run`` (see `fingerprint`).
        """
        self._lease = self._open.enter_context(held(study, self.guard.stopped))
        self.checkpoint = Checkpoint(self._lease, run)
        for step, usage in self.checkpoint.usage().items():
            self.budget.step(step).add(usage)

    @property
    def search_calls(self) -> int:
        """Most program calls of the search."""
        return self.options.max_calls or 0

    @property
    def demo_limits(self) -> dict[str, Any]:
        """Most demos of each kind in a demo set, by DSPy's names; demos are optimised unless both are 0."""
        names, given = ("max_bootstrapped_demos", "max_labeled_demos"), self.arguments
        return {n: getattr(self.optimizer, n) if given.get(n) is None else given[n] for n in names}

    @property
    def takes_notes(self) -> bool:
        """Whether program calls have notes, which proposers read."""
        return self.options.is_adaptive

    @property
    def storage(self) -> BaseStorage | None:
        """The open storage of this run, if one was given."""
        return None if self.checkpoint is None else self.checkpoint.study._storage

    def keeping(self, step: str, *name: object) -> AbstractContextManager[None]:
        """A context in which answers of LMs are saved, so that they are paid for only once."""
        # The search counts the usage of its scores itself.
        meter = None if step == SEARCH else self.budget.step(step)
        return keeping(self.checkpoint, ":".join(map(str, (step, *name))), meter)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A context that counts the usage of a step, and raises SearchStoppedError for errors that end it."""
        meter, began = self.budget.step(name), time.monotonic()
        before = meter.total.lm_calls
        try:
            with self._explained(name), measured(meter):
                yield
                record(Usage(seconds=time.monotonic() - began))
        except BaseException:
            self.threads.close(self.options.grace)  # calls in flight are counted too
            raise
        finally:
            if self.checkpoint is not None and meter.total.lm_calls > before:
                self.checkpoint.keep_usage(name, meter.total)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
            error = self._failure
        except Exception as raised:
            if raised is not self._failure and classify(raised) not in {Verdict.STOP, *INFRASTRUCTURE}:
                raise
            error = raised
        except Stopped as stop:
            error = self._failure
            if error is None and self.budget.reached is not None:
                raise self.budget.used_up(f"in the {name} step, before the search began") from stop
            if error is None:
                raise
        if error is not None:
            kept = "" if self.checkpoint is None else ": what is in the storage is not paid for twice"
            raise stopped(
                f"The {name} step stopped because of {reason(error)}. When this is repaired, make the same "
                f"call again{kept}.",
                error,
            )

    @property
    def _failure(self) -> BaseException | None:
        """The error after which no further call is useful, if there is one."""
        lost = None if self._lease is None else self._lease.lost
        return self.metric.failure or lost or self.threads.failure

    def score_first(self, program: Any) -> None:
        """Score the student on the example that the search begins with, before anything else is paid for.

        A broken metric ends the compile here. The search uses this score instead of its own call (see
        `with_first`).
        """
        if self.first is None or (self.checkpoint is not None and self.checkpoint.n_scores()):
            return
        self._first = FirstScore(program, *self.first)
        with measured(self.budget.step(SEARCH)):
            result_of(self.threads.submit(self._first.make, self))

    def with_first(self, score: Score, programs: ProgramSpace, valset: list[Any]) -> Score:
        """``score``, but with the outcome of `score_first` instead of the first call for it."""
        first, score = self._first, reusing(self.checkpoint, score)
        # A score is valid only for the program and the validation set with which it was measured.
        if first is None or programs.program is not first.program or valset is not first.valset:
            return score
        return partial(first.score_or, score, programs.baseline, self)

    def end_steps(self) -> None:
        """End the threads of the steps.

        Raises:
            Stopped: A limit was reached before the search.
        """
        self.threads.close(self.options.grace)
        if is_over():
            raise Stopped
        self.guard.spares = True  # from now on, the workers begin no call after a limit is reached


class Threads(DaemonThreads):
    """The threads of the steps before the search; each call runs in a copy of its caller's context.

    Attributes:
        attempts: Makes a call with retries, in the calling thread.
        failure: The error after which no other call can succeed; no call begins after it.
    """

    def __init__(
        self, number: int, retry: RetryPolicy | None = None, admits: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(number, "mpromptune-step")
        self.failure: BaseException | None = None
        self._stopped = threading.Event()
        judged = self._judge, retry or RetryPolicy(), retry_after
        self.attempts = Attempts(*judged, number, self._stopped, admits)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a call; it raises `Stopped` if it has not begun before `stop`."""
        return super().submit(contextvars.copy_context().run, self._run, fn, *args, **kwargs)

    def stop(self) -> None:
        """Begin no more calls; calls in flight make no further LM call."""
        self._stopped.set()

    def close(self, within: float | None = None) -> None:
        """Stop; the first time, wait for calls in flight, at most ``within`` seconds."""
        is_first = not self._closed
        self.stop()
        # Not `cancel_futures`: a thread that waits for a future is not notified of its cancellation.
        self.shutdown(wait=False)
        if is_first:
            self.join(within)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _judge(self, error: BaseException) -> Verdict:
        verdict = classify(error)
        if verdict is Verdict.STOP:
            self.failure = self.failure or error
            self.stop()
        return verdict

    def _run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with stoppable(self._stopped.is_set):
            check_stopped()
            return call(*args, **kwargs)


class FirstScore:
    """The score of the student on one example, measured before the search, which uses it.

    Args:
        program: The student.
        valset: The validation examples.
        example: Index of the example.
    """

    def __init__(self, program: Any, valset: list[Any], example: int) -> None:
        self.program, self.valset, self._example = program, valset, example
        self._prediction: Any = None
        self._outcomes: list[tuple[float | Exception, Usage]] = []  # empty once the search has used it

    def make(self, run: Run) -> None:
        """Measure it; an error of the program or of the infrastructure is raised in the search."""
        student = ProgramSpace(self.program, {})
        runner = ProgramRunner(student, self.valset, run.metric, self._keep, run.takes_notes)
        score = scorer(runner, wants_traceback(run.arguments.get("provide_traceback")))
        began = time.monotonic()
        outcome: float | Exception
        with measured() as meter, run.keeping(SEARCH, self._example):
            record(Usage(program_calls=1))
            try:
                outcome = score(student.baseline, self._example)
            except Exception as error:
                if classify(error) is Verdict.STOP:
                    raise
                outcome = error
            record(Usage(seconds=time.monotonic() - began))
        self._outcomes.append((outcome, meter.total))

    def score_or(
        self, score: Score, student: Mapping[str, int], run: Run, params: dict[str, int], example: int
    ) -> float:
        """This score, for the first call of the search that needs it; otherwise a new one."""
        if params != student or example != self._example or not self._outcomes:
            return score(params, example)
        outcome, usage = self._outcomes.pop()
        run.evaluations.keep(params, example, self._prediction)
        # Its usage moves from the whole search to this call, which does not run the program.
        run.budget.step(SEARCH).add(Usage() - usage)
        record(usage - Usage(program_calls=1))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _keep(self, params: Mapping[str, int], example: int, prediction: Any) -> None:
        self._prediction = prediction


def max_errors(own: int | None) -> int:
    """DSPy's ``max_errors``; by default that of its settings."""
    return int(dspy.settings.max_errors if own is None else own)


def wants_traceback(own: bool | None) -> bool:
    """DSPy's ``provide_traceback``; by default that of its settings."""
    return bool(dspy.settings.provide_traceback if own is None else own)
