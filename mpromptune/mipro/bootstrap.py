"""The first step of a compile: DSPy's demo sets, all bootstrapped at the same time.

DSPy's own loop runs one example of one set after the other; what is by hand here is which of them may run at
the same time without a call that DSPy would not make.
"""

from __future__ import annotations

import copy
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from dspy.teleprompt import BootstrapFewShot, LabeledFewShot

from mpromptune.errors import CallCancelledError
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.interrupts import contained, result_of
from mpromptune.execution.usage import Usage, record
from mpromptune.lms.adapters import Keeping, keep_nothing
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import note_call
from mpromptune.lms.metering import measured
from mpromptune.lms.threads import Threads
from mpromptune.mipro import proposal
from mpromptune.mipro.checkpoint import DemoSets
from mpromptune.mipro.estimate import demo_numbers
from mpromptune.mipro.run import Run, max_errors

logger = logging.getLogger(__name__)


def demo_sets(run: Run, given: Mapping[str, Any]) -> DemoSets:
    """Per predictor, its demo sets. Threads that this leaves idle begin with what comes after it.

    Args:
        run: The compile.
        given: DSPy's arguments of this step, by name.
    """
    checkpoint, program, trainset = run.checkpoint, given["program"], given["trainset"]
    with run.step("bootstrap"):
        kept = None if checkpoint is None else checkpoint.demo_sets()
        is_proposed = checkpoint is not None and checkpoint.instructions() is not None
        number = given["num_fewshot_candidates"]
        bar = run.view.bar("Bootstrapping", number, "demo sets")
        # What DSPy refuses about student and teacher it refuses here, before any call; and what it draws at
        # random is drawn here, also where the sets are known.
        build = _prepared(run, given, bar.advance)
        if not is_proposed and run.num_threads > 1:
            proposal.begin(run, program, trainset)
        is_idle = kept is None or not is_proposed
        # Without a bootstrap nothing else would call the metric before the proposals are paid.
        is_first = kept is None and demo_numbers(given)[0] == 0
        run.score_ahead(program, trainset, is_idle, is_first)
        if kept is not None:
            logger.info("The demo sets are those that an interrupted run has bootstrapped.")
            bar.advance(number)
            run.metric.known.set()
            return kept
        demos = build()
        run.metric.known.set()
        if (down := run.threads.attempts.down) is not None:  # an outage, not a bad teacher
            raise down
        return demos if checkpoint is None else checkpoint.keep_demo_sets(program, demos)


def _prepared(run: Run, given: Mapping[str, Any], on_set: Callable[[], None]) -> Callable[[], DemoSets]:
    bootstrapped, labelled = demo_numbers(given)
    return prepared_demo_sets(
        run.optimizer.rng,
        run.threads,
        student=given["program"],
        teacher=given["teacher"],
        trainset=given["trainset"],
        num_candidate_sets=given["num_fewshot_candidates"],
        max_labeled_demos=labelled,
        max_bootstrapped_demos=bootstrapped,
        on_set=on_set,
        keep=partial(run.keeping, "bootstrap"),
        metric=run.metric,
        metric_threshold=given["metric_threshold"],
        max_errors=max_errors(given["max_errors"]),
        teacher_settings=dict(run.optimizer.teacher_settings),
    )


def prepared_demo_sets(
    rng: random.Random,
    threads: Threads,
    *,
    student: Any,
    teacher: Any,
    trainset: list[Any],
    num_candidate_sets: int,
    max_labeled_demos: int,
    max_bootstrapped_demos: int,
    on_set: Callable[[], None] = lambda: None,
    keep: Keeping = keep_nothing,
    **settings: Any,
) -> Callable[[], DemoSets]:
    """Does all of DSPy's ``create_n_fewshot_demo_sets`` that needs no LM: every random draw, in its order.

    Arguments are as there, with those of ``BootstrapFewShot``; ``on_set`` is called after every set, in
    order, and ``keep`` is of the attempts, each named by the numbers of its set and its example.

    What is returned bootstraps all sets at the same time, and returns those of each predictor. Without
    bootstrapped demos, where DSPy draws from an empty range and crashes, all sets but the first, which is
    empty, are labelled examples that were drawn at random.
    """
    label = LabeledFewShot(k=max_labeled_demos).compile
    settings["max_labeled_demos"] = max_labeled_demos
    makers: list[Callable[[], Any]] = []
    # All ``compile`` methods of DSPy's are called here: what is hooked into them, MLflow's autologging for
    # one, takes those of another thread for compiles by themselves.
    for number in range(num_candidate_sets):
        examples, size = list(trainset), max_bootstrapped_demos
        if number == 0:
            makers.append(student.reset_copy)
        elif not size or (number == 1 and max_labeled_demos):
            if not size:
                rng.shuffle(examples)
            makers.append(partial(_same, label(student, trainset=examples)))
        else:
            if number != 2:
                rng.shuffle(examples)
                size = rng.randint(1, size)
            bootstrap = ConcurrentBootstrap(
                threads, partial(keep, number), max_bootstrapped_demos=size, **settings
            )
            makers.append(bootstrap.prepared(student, teacher, examples))
    return partial(_made, makers, threads, on_set)


def _same(program: Any) -> Any:
    return program


def _made(makers: list[Callable[[], Any]], threads: Threads, on_set: Callable[[], None]) -> DemoSets:
    programs: list[Any] = []
    # A thread for each set, which only waits; closing `threads` ends them after an error.
    with Threads(max(1, len(makers)), grace=0) as sets:
        futures = [sets.submit(maker) for maker in makers]
        try:
            for future in futures:
                programs.append(result_of(future))
                on_set()
        except BaseException:
            threads.close(threads.grace)
            raise
    predictors = zip(*(program.predictors() for program in programs), strict=True)
    return {i: [predictor.demos for predictor in some] for i, some in enumerate(predictors)}


class ConcurrentBootstrap(BootstrapFewShot):
    """Bootstraps one set: runs the next examples at the same time and takes their outcomes in order.

    While k successes are missing, the serial loop will run the next k examples whatever comes of
    them, so these are started and no others: no call is made that DSPy would not make. The one
    exception: a teacher that fails on an example that is one of its demos goes on without that demo
    (in DSPy too), and what was started with it is run again.

    Attributes:
        error: Of an attempt: what the program or the metric raised.
        success: Of an attempt: whether the metric accepted it.
    """

    error: Exception | None = None
    success = False

    def __init__(self, threads: Threads, keep: Keeping, **settings: Any) -> None:
        super().__init__(**settings)
        self._keep = keep
        self._threads = threads

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
        running: deque[tuple[int, Future[ConcurrentBootstrap]]] = deque()
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

    def _is_certain(self, missing: int, running: deque[tuple[int, Future[ConcurrentBootstrap]]]) -> bool:
        """Whether the serial loop would run one more example, however the running ones end."""
        outcomes = [future.result() if future.done() else None for _, future in running]
        successes = sum(o is None or o.success for o in outcomes)
        errors = sum(o is None or o.error is not None for o in outcomes)
        return successes < missing and self.error_count + errors < self.max_errors

    def _take(
        self, running: deque[tuple[int, Future[ConcurrentBootstrap]]], accepted: set[int], following: int
    ) -> int:
        """Takes outcomes from the front, once something is done; the next example to start."""
        wait([future for _, future in running if not future.done()], return_when=FIRST_COMPLETED)
        while running and running[0][1].done():
            index, future = running.popleft()
            attempt = future.result()
            if attempt.success:
                accepted.add(index)
            for name, demos in attempt.name2traces.items():
                self.name2traces[name].extend(demos)
            if attempt.error is not None:
                self._count(attempt.error, self.trainset[index])
            if _n_demos(attempt.teacher) != _n_demos(self.teacher):
                for predictor in self.teacher.predictors():
                    predictor.demos = [demo for demo in predictor.demos if demo != self.trainset[index]]
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

    def _attempt(self, index: int) -> ConcurrentBootstrap:
        """A bootstrap of one example alone, which has ended."""
        tries: list[ConcurrentBootstrap] = []

        def once() -> bool:
            tries.append(self._alone())
            with measured() as meter, self._keep(index), blaming():
                record(Usage(program_calls=1))
                success = bool(contained(tries[-1]._bootstrap_one_example, self.trainset[index]))
            note_call(meter.total)
            return success

        try:
            success = self._threads.attempts(once)
        except Exception as error:
            alone = tries[-1]
            is_counted = alone.error_count or isinstance(error, CallCancelledError)
            if not is_counted or classify(error) is Verdict.STOP:
                raise  # DSPy lets the former pass
            alone.error = error
        else:
            alone = tries[-1]
            alone.success = success
        return alone

    def _alone(self) -> ConcurrentBootstrap:
        """One with a teacher of its own: DSPy's attempt takes the example out of its demos in place."""
        alone = copy.copy(self)
        alone.teacher = self.teacher.deepcopy()
        for own, shared in zip(alone.teacher.predictors(), self.teacher.predictors(), strict=True):
            own.demos = shared.demos  # the very same objects, which are compared with the example
        alone._prepare_predictor_mappings()
        alone.name2traces = {name: [] for name in self.name2predictor}
        alone.max_errors, alone.error_count = 1, 0  # an error is raised, and counted when its turn comes
        return alone


def _n_demos(program: Any) -> list[int]:
    return [len(predictor.demos) for predictor in program.predictors()]
