"""A running compile: the state that its three steps share, and scores of the student by idle threads."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import dspy
from optuna.storages import BaseStorage
from optuna.study import Study

from mpromptune.engine.options import SearchOptions
from mpromptune.errors import SearchInterrupted, SearchStoppedError
from mpromptune.execution.attempts import FAILURES, INFRASTRUCTURE, Verdict
from mpromptune.execution.interrupts import Stopped, interrupted, is_over, result_of
from mpromptune.execution.limits import SEARCH, Budget, patience
from mpromptune.execution.pool import Score
from mpromptune.execution.remote import Workplace
from mpromptune.execution.usage import StepUsage, Usage, current_meter, record
from mpromptune.lms.adapters import keeping, reusing
from mpromptune.lms.errors import classify
from mpromptune.lms.guard import Guard
from mpromptune.lms.metering import Pricing, measured
from mpromptune.lms.threads import Threads
from mpromptune.mipro.checkpoint import Checkpoint
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace, scorer
from mpromptune.mipro.fingerprint import Part
from mpromptune.mipro.metric import CheckedMetric
from mpromptune.mipro.results import Evaluations
from mpromptune.show.screens import choose
from mpromptune.show.view import View
from mpromptune.storage.lease import Lease, held

logger = logging.getLogger(__name__)


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
        search_calls: Most program calls of the search.
        estimated: Most usage of each step.
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
        self.threads = pool = Threads(self.num_threads, options.grace, options.retry, self.budget.admits)
        self.place = Workplace(None if options.dry_run else options.executor)
        self.metric = CheckedMetric(optimizer.metric, pool.end)
        self.view = View(choose if options.verbose else lambda: None, self.budget, lambda: pool.load)
        self.evaluations = Evaluations(optimizer.metric)
        self.checkpoint: Checkpoint | None = None
        self.proposer: Any = None
        self.num_instructions = self.search_calls = 0  # set when DSPy has determined the size of the run
        self.estimated = StepUsage()
        self._valset: list[Any] | None = None
        self._first: Sequence[int] = ()
        self._ahead: Ahead | None = None
        self._lease: Lease | None = None
        self._open = ExitStack()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A context in which all resources of the steps are open; errors get the program and the usage."""
        try:
            with self.budget.ending(), self.guard.watching(), self._open, self.place:
                try:
                    yield
                finally:
                    self.guard.stopped.set()  # calls in flight make no further LM call
                    try:
                        self.threads.close(self.threads.grace)
                    finally:
                        self.view.close()
        except (SearchInterrupted, SearchStoppedError) as error:
            error.program = self.student if error.program is None else error.program
            error.usage = self.budget.usage
            raise
        except KeyboardInterrupt as signalled:
            outside = interrupted(signalled)("The compile was interrupted outside its search.")
            outside.program, outside.usage = self.student, self.budget.usage
            raise outside from signalled

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
            with measured(meter):
                yield
                record(Usage(seconds=time.monotonic() - began))
            if self._failure is not None:
                raise self._failure
        except Exception as error:
            if error is self._failure or classify(error) in {Verdict.STOP, *INFRASTRUCTURE}:
                raise _stopped(name, error) from error
            raise
        except Stopped as stop:
            if self._failure is not None:
                raise _stopped(name, self._failure) from self._failure
            if self.budget.reached is None:
                raise
            raise self.budget.used_up(f"in the {name} step, before the search began") from stop
        finally:
            if self.checkpoint is not None and meter.total.lm_calls > before:
                self.checkpoint.keep_usage(name, meter.total)

    @property
    def _failure(self) -> BaseException | None:
        """The error after which no further call is useful, if there is one."""
        lost = None if self._lease is None else self._lease.lost
        return self.metric.failure or lost or self.threads.failure

    # Scores of the student before the search.

    def want_scores(self, valset: list[Any], first: Sequence[int]) -> None:
        """Let idle threads score the student on these examples of ``valset``, from the first step on."""
        self._valset, self._first = valset, first

    def score_ahead(self, program: Any, trainset: Any, is_idle: bool, is_first: bool) -> None:
        """Begin to score the student in idle threads, except on examples scored by an interrupted run.

        Examples that the bootstrap also uses are left out, because the search finds their answers in the
        cache. With ``is_first`` it waits for the first score, which shows whether the metric works.
        """
        if self._valset is None:
            return
        self._ahead = ahead = Ahead(self, program, self._valset)
        if not is_idle:
            return
        bootstrapped = {hash(repr(example)) for example in trainset}
        others = [i for i in self._first if hash(repr(self._valset[i])) not in bootstrapped]
        with measured(self.budget.step(SEARCH)):
            calls = ahead.calls(others)
            for first in islice(calls, int(is_first)):
                result_of(self.threads.submit(first))
            self.threads.fill(calls)

    def end_steps(self) -> None:
        """Start no further calls of the steps, and wait for those in flight unless they seem to hang.

        Raises:
            Stopped: A limit was reached before the search.
        """
        usage = self.budget.usage.get(SEARCH, Usage())  # of the scores before the search
        most = math.inf if self.options.timeout is None else self.options.timeout
        self.threads.finish(patience(usage, usage.program_calls, self.threads.grace, most))
        if is_over():
            raise Stopped
        self.guard.spares = True  # from now on, the workers begin no call after a limit is reached

    def known_or(self, score: Score, programs: ProgramSpace, valset: list[Any]) -> Score:
        """``score``, but with known scores of the student instead of new ones; for use after `end_steps`."""
        score = reusing(self.checkpoint, score)
        ahead = self._ahead
        # Scores are valid only for the program and the validation set with which they were measured.
        if ahead is None or programs.program is not ahead.program or valset is not self._valset:
            return score
        if self.checkpoint is not None:
            ahead.forget(self.checkpoint.measured(programs.baseline))
        return partial(ahead.score_or, score, programs.baseline)


def _stopped(step: str, error: BaseException) -> SearchStoppedError:
    return SearchStoppedError(
        f"The {step} step stopped because of {type(error).__name__}: {error}. Earlier results are kept in "
        "the storage, if one was given."
    )


def max_errors(own: int | None) -> int:
    """DSPy's ``max_errors``; by default that of its settings."""
    return int(dspy.settings.max_errors if own is None else own)


def wants_traceback(own: bool | None) -> bool:
    """DSPy's ``provide_traceback``; by default that of its settings."""
    return bool(dspy.settings.provide_traceback if own is None else own)


class Ahead:
    """Scores the student before the search, which needs these scores in any case.

    It stops as the bootstrap does: after ``max_errors`` errors, or one that is not the program's own.
    """

    def __init__(self, run: Run, program: Any, valset: list[Any]) -> None:
        self.program = program
        self._run = run
        self._max_errors = max_errors(run.optimizer.max_errors)
        student = ProgramSpace(program, {})
        keep = run.evaluations.keep
        runner = ProgramRunner(student, valset, run.metric, lambda _, i, made: keep({}, i, made))
        score = scorer(runner, wants_traceback(run.arguments.get("provide_traceback")))
        self._score = partial(score, student.baseline)
        self._outcomes = {} if run.checkpoint is None else run.checkpoint.student_outcomes()
        self._of_earlier_run = set(self._outcomes)

    def calls(self, examples: list[int]) -> Iterator[Callable[[], None]]:
        """Yield a call for each example without an outcome, until too many calls have failed."""
        for example in examples:
            if self._has_failed():
                return
            if example not in self._outcomes:
                yield partial(self._measure, example)

    def forget(self, examples: set[int]) -> None:
        """Remove outcomes that the search has already used; if it asks again, it needs a new score."""
        for example in examples:
            self._outcomes.pop(example, None)

    def _has_failed(self) -> bool:
        errors = [o for o, _ in tuple(self._outcomes.values()) if isinstance(o, Exception)]
        foreign = any(classify(error) not in FAILURES for error in errors)
        return foreign or len(errors) >= self._max_errors

    def _measure(self, example: int) -> None:
        began = time.monotonic()
        outcome: float | Exception
        with measured() as meter:
            record(Usage(program_calls=1))
            try:
                with self._run.keeping(SEARCH, example):
                    outcome = self._score(example)
            except Exception as error:  # noqa: BLE001 - raised when the search asks for the score
                outcome = error
            record(Usage(seconds=time.monotonic() - began))
        self._outcomes[example] = outcome, meter.total
        if self._run.checkpoint is not None:
            self._run.checkpoint.keep_student_outcome(example, outcome, meter.total)

    def score_or(self, score: Score, student: dict[str, int], params: dict[str, int], example: int) -> float:
        """The known outcome of the student, used once (a retry is a new call), or a new score."""
        known = self._outcomes.pop(example, None) if params == student else None
        if known is None:
            return score(params, example)
        outcome, usage = known
        meter = current_meter()
        if meter is not None:
            meter.add(Usage(program_calls=-1))  # the program has not been run for this call
            # The meter of the search has already counted the scores that this run made before it.
            (meter.add if example in self._of_earlier_run else meter.attribute)(usage)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
