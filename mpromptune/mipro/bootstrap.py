"""Demo sets: DSPy's bootstrap with its LM calls at the same time, and sets that it cannot build."""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot
from dspy.teleprompt.mipro_optimizer_v2 import (
    BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
    LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT,
)

from mpromptune.calls.attempts import Verdict
from mpromptune.calls.interrupts import contained, result_of
from mpromptune.calls.usage import Usage, record
from mpromptune.errors import CallCancelledError
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import measured, note_call
from mpromptune.lms.threads import Threads

logger = logging.getLogger(__name__)

DemoSets = dict[int, list[list[Any]]]
Keep = Callable[..., AbstractContextManager[None]]

# What `_Bootstrap` overrides, calls or sets of DSPy's class.
_INTERNALS = (
    "_prepare_student_and_teacher",
    "_prepare_predictor_mappings",
    "_bootstrap",
    "_bootstrap_one_example",
    "_train",
)


def is_supported() -> bool:
    """Whether this DSPy has the internals that the concurrent bootstrap is made of."""
    return all(hasattr(BootstrapFewShot, name) for name in _INTERNALS)


def max_errors(own: int | None) -> int:
    """DSPy's ``max_errors``, which its settings decide unless it is given."""
    return int(dspy.settings.max_errors if own is None else own)


@dataclass(frozen=True)
class DemoSetPlan:
    """The demo sets that DSPy's MIPROv2 would build; fields as in its `create_n_fewshot_demo_sets`."""

    student: Any
    teacher: Any
    trainset: list[Any]
    num_candidate_sets: int
    max_labeled_demos: int
    max_bootstrapped_demos: int
    metric: Any
    metric_threshold: float | None
    max_errors: int | None
    teacher_settings: Mapping[str, Any]

    @classmethod
    def of(cls, optimizer: Any, student: Any, trainset: list[Any], given: Mapping[str, Any]) -> DemoSetPlan:
        """As MIPROv2 has it: a zero-shot run bootstraps demos too, for the proposer to look at."""
        bootstrapped, labelled = given["max_bootstrapped_demos"], given["max_labeled_demos"]
        if bootstrapped == 0 and labelled == 0:
            bootstrapped = BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT
            labelled = LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT
        return cls(
            student=student,
            teacher=given["teacher"],
            trainset=trainset,
            num_candidate_sets=given["num_fewshot_candidates"],
            max_labeled_demos=labelled,
            max_bootstrapped_demos=bootstrapped,
            metric=optimizer.metric,
            metric_threshold=given["metric_threshold"],
            max_errors=max_errors(given["max_errors"]),
            teacher_settings=optimizer.teacher_settings,
        )

    def build(
        self,
        rng: random.Random,
        threads: Threads,
        on_set: Callable[[], None] = lambda: None,
        keep: Keep = lambda *name: nullcontext(),
    ) -> DemoSets:
        """Builds all sets at the same time; they are those of DSPy's serial loop.

        Args:
            rng: Drawn from exactly as DSPy does.
            threads: Run the program calls.
            on_set: Called after every set, in order.
            keep: Keeps what LMs answer in the attempt of that name, and answers from what is kept.

        Returns:
            Per predictor, its demo sets.
        """
        return self.prepared(rng, threads, on_set, keep)()

    def prepared(
        self,
        rng: random.Random,
        threads: Threads,
        on_set: Callable[[], None] = lambda: None,
        keep: Keep = lambda *name: nullcontext(),
    ) -> Callable[[], DemoSets]:
        """`build`, of which everything is done but what asks an LM; arguments as there."""
        return partial(self._made, self._draw(rng, threads, keep), threads, on_set)

    def _made(
        self, makers: list[Callable[[], Any]], threads: Threads, on_set: Callable[[], None]
    ) -> DemoSets:
        demos: DemoSets = {i: [] for i, _ in enumerate(self.student.predictors())}
        # A thread for each set, which only waits; closing `threads` ends them after an error.
        with Threads(max(1, len(makers)), grace=0) as sets:
            futures = [sets.submit(maker) for maker in makers]
            try:
                for future in futures:
                    _append(demos, result_of(future))
                    on_set()
            except BaseException:
                threads.close(threads.grace)
                raise
        return demos

    def _draw(self, rng: random.Random, threads: Threads, keep: Keep) -> list[Callable[[], Any]]:
        """What makes each set's program, with everything random drawn in DSPy's order.

        All ``compile`` methods of DSPy's are called here: what is hooked into them, MLflow's
        autologging for one, takes those of another thread for compiles by themselves.
        """
        makers: list[Callable[[], Any]] = []
        turns = _Turns()
        for number in range(self.num_candidate_sets):
            trainset, size = list(self.trainset), self.max_bootstrapped_demos
            if number == 0:
                makers.append(self.student.reset_copy)
                continue
            if number == 1 and self.max_labeled_demos > 0:
                labelled = LabeledFewShot(k=self.max_labeled_demos).compile(self.student, trainset=trainset)
                makers.append(partial(_same, labelled))
                continue
            if number != 2:
                rng.shuffle(trainset)
                size = rng.randint(1, size)
            bootstrap = _Bootstrap(threads, turns, partial(keep, number), **self._settings(size))
            makers.append(bootstrap.prepared(self.student, self.teacher, trainset))
        return makers

    def _settings(self, size: int) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "metric_threshold": self.metric_threshold,
            "max_errors": self.max_errors,
            "max_bootstrapped_demos": size,
            "max_labeled_demos": self.max_labeled_demos,
            "teacher_settings": dict(self.teacher_settings),
        }


def _same(program: Any) -> Any:
    return program


def _append(demos: DemoSets, program: Any) -> None:
    for i, predictor in enumerate(program.predictors()):
        demos[i].append(predictor.demos)


class _Turns:
    """Keeps requests that would be equal apart, so that the second finds the first one's in the cache."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[object, threading.Lock] = {}

    def of(self, key: object) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())


@dataclass(frozen=True)
class _Attempt:
    """What came of running the teacher on one example.

    Attributes:
        success: Whether the metric accepted it.
        traces: Demos by the name of their predictor.
        error: What the program or the metric raised.
        lost_demos: Whether DSPy's teacher would be left without this example as a demo.
    """

    success: bool
    traces: Mapping[str, list[Any]]
    error: Exception | None = None
    lost_demos: bool = False


class _Failed(Exception):  # noqa: N818 - carries an error, which is its cause
    """An attempt that DSPy counts as an error."""

    def __init__(self, alone: _Bootstrap, error: Exception) -> None:
        super().__init__(str(error))
        self.alone, self.error = alone, error


class _Bootstrap(BootstrapFewShot):
    """Runs the next examples at the same time and takes their outcomes in order.

    While k successes are missing, the serial loop will run the next k examples whatever comes of
    them, so these are started and no others: no call is made that DSPy would not make. The one
    exception: a teacher that fails on an example that is one of its demos goes on without that demo
    (in DSPy too), and what was started with it is run again.
    """

    def __init__(self, threads: Threads, turns: _Turns, keep: Keep, **settings: Any) -> None:
        super().__init__(**settings)
        self._keep = keep
        self._threads = threads
        self._turns = turns

    def prepared(self, student: Any, teacher: Any, trainset: list[Any]) -> Callable[[], Any]:
        """DSPy's ``compile``, of which everything is done but what is returned: that asks the LM."""
        self.trainset = trainset
        self._prepare_student_and_teacher(student, teacher)
        self._prepare_predictor_mappings()
        return self._bootstrapped

    def _bootstrapped(self) -> Any:
        self._bootstrap()
        self.student = self._train()
        self.student._compiled = True
        return self.student

    def _bootstrap(self, *, max_bootstraps: int | None = None) -> None:
        wanted = max_bootstraps or self.max_bootstrapped_demos
        self.name2traces: dict[str, list[Any]] = {name: [] for name in self.name2predictor}
        accepted: set[int] = set()
        running: deque[tuple[int, Future[_Attempt]]] = deque()
        following = 0
        while True:
            while following < len(self.trainset) and self._is_certain(wanted - len(accepted), running):
                running.append((following, self._threads.submit(self._attempt, following)))
                following += 1
            if not running:
                break
            following = self._take(running, accepted, following)
        self.validation = [x for i, x in enumerate(self.trainset) if i not in accepted]
        random.Random(0).shuffle(self.validation)

    def _is_certain(self, missing: int, running: deque[tuple[int, Future[_Attempt]]]) -> bool:
        """Whether the serial loop would run one more example, however the running ones end."""
        outcomes = [future.result() if future.done() else None for _, future in running]
        successes = sum(o is None or o.success for o in outcomes)
        errors = sum(o is None or o.error is not None for o in outcomes)
        return successes < missing and self.error_count + errors < self._error_limit()

    def _error_limit(self) -> int:
        return int(dspy.settings.max_errors if self.max_errors is None else self.max_errors)

    def _take(self, running: deque[tuple[int, Future[_Attempt]]], accepted: set[int], following: int) -> int:
        """Takes outcomes from the front, once something is done; the next example to start."""
        unfinished = [future for _, future in running if not future.done()]
        wait(unfinished, return_when=FIRST_COMPLETED)
        while running and running[0][1].done():
            index, future = running.popleft()
            attempt = future.result()
            if attempt.success:
                accepted.add(index)
            for name, demos in attempt.traces.items():
                self.name2traces[name].extend(demos)
            if attempt.error is not None:
                self._count(attempt.error, self.trainset[index])
            if attempt.lost_demos:
                _forget(self.teacher, self.trainset[index])
                for _, late in running:
                    late.cancel()
                running.clear()
                return index + 1
        return following

    def _count(self, error: Exception, example: Any) -> None:
        self.error_count += 1
        if self.error_count >= self._error_limit():
            raise error
        logger.error(
            "Failed to run or to evaluate example %s with %s due to %s.", example, self.metric, error
        )

    def _attempt(self, index: int) -> _Attempt:
        """DSPy's own attempt, on a teacher of its own: it takes the example out of the demos in place."""
        example = self.trainset[index]
        key = (id(example), repr([p.demos for p in self.teacher.predictors()]))
        try:
            with self._turns.of(key):
                alone, success = self._threads.attempts(partial(self._once, index))
        except _Failed as failed:
            lost_demos = _n_demos(failed.alone.teacher) != _n_demos(self.teacher)
            return _Attempt(False, {}, failed.error, lost_demos)
        return _Attempt(success, alone.name2traces)

    def _once(self, index: int) -> tuple[_Bootstrap, bool]:
        alone = self._alone()
        try:
            with measured() as meter, self._keep(index), blaming():
                record(Usage(program_calls=1))
                success = bool(contained(alone._bootstrap_one_example, self.trainset[index]))
        except Exception as error:
            counted = alone.error_count or isinstance(error, CallCancelledError)
            if not counted or classify(error) is Verdict.STOP:
                raise  # DSPy lets the former pass
            raise _Failed(alone, error) from error
        note_call(meter.total)
        return alone, success

    def _alone(self) -> _Bootstrap:
        alone = copy.copy(self)
        alone.teacher = self.teacher.deepcopy()
        for own, shared in zip(alone.teacher.predictors(), self.teacher.predictors(), strict=True):
            own.demos = shared.demos  # the very same objects, which are compared with the example
        alone._prepare_predictor_mappings()
        alone.name2traces = {name: [] for name in self.name2predictor}
        alone.max_errors, alone.error_count = 1, 0  # an error is raised, and counted when its turn comes
        return alone


def _forget(teacher: Any, example: Any) -> None:
    for predictor in teacher.predictors():
        predictor.demos = [demo for demo in predictor.demos if demo != example]


def _n_demos(program: Any) -> list[int]:
    return [len(predictor.demos) for predictor in program.predictors()]


def labelled_demo_sets(
    program: Any, trainset: list[Any], num_sets: int, k: int, rng: random.Random
) -> DemoSets:
    """Demo sets of labelled examples only, where DSPy draws from an empty range and crashes.

    Args:
        program: The student.
        trainset: Where demos are drawn from.
        num_sets: Sets wanted; the first is empty (zero-shot), as in DSPy.
        k: Demos per set.
        rng: Shuffles the trainset for every further set.

    Returns:
        Per predictor, ``num_sets`` demo sets.
    """
    versions = [program.reset_copy()]
    for _ in range(num_sets - 1):
        shuffled = list(trainset)
        rng.shuffle(shuffled)
        versions.append(LabeledFewShot(k=k).compile(program, trainset=shuffled))
    predictors = [version.predictors() for version in versions]
    return {i: [list(p[i].demos) for p in predictors] for i in range(len(predictors[0]))}
