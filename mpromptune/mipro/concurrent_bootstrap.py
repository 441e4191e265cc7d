"""DSPy's bootstrap of one demo set, with its next examples run at the same time."""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspy.teleprompt import BootstrapFewShot

from mpromptune.errors import CallCancelledError
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.interrupts import contained
from mpromptune.execution.usage import Usage, record
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import measured, note_call
from mpromptune.lms.kept import Keeping
from mpromptune.lms.threads import Threads

logger = logging.getLogger(__name__)

# What `ConcurrentBootstrap` overrides, calls or sets of DSPy's class.
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


class Turns:
    """Keeps requests that would be equal apart, so that the second finds the first one's in the cache."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[object, threading.Lock] = {}

    def of(self, key: object) -> threading.Lock:
        """To be held during a request of that key."""
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

    def __init__(self, alone: ConcurrentBootstrap, error: Exception) -> None:
        super().__init__(str(error))
        self.alone, self.error = alone, error


class ConcurrentBootstrap(BootstrapFewShot):
    """Runs the next examples at the same time and takes their outcomes in order.

    While k successes are missing, the serial loop will run the next k examples whatever comes of
    them, so these are started and no others: no call is made that DSPy would not make. The one
    exception: a teacher that fails on an example that is one of its demos goes on without that demo
    (in DSPy too), and what was started with it is run again.
    """

    def __init__(self, threads: Threads, turns: Turns, keep: Keeping, **settings: Any) -> None:
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
        return successes < missing and self.error_count + errors < self.max_errors

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
        if self.error_count >= self.max_errors:
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

    def _once(self, index: int) -> tuple[ConcurrentBootstrap, bool]:
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

    def _alone(self) -> ConcurrentBootstrap:
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
