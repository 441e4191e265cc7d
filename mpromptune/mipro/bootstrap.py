"""The first step of a compile: DSPy's demo sets, all bootstrapped at the same time.

DSPy's own loop makes one set after another. Here all random draws are made first, in DSPy's order, so that
the sets can be made at the same time.
"""

from __future__ import annotations

import contextvars
import logging
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dspy.teleprompt import BootstrapFewShot, LabeledFewShot

from mpromptune.errors import CallCancelledError
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.interrupts import check_stopped, contained, result_of
from mpromptune.execution.pool import in_daemon
from mpromptune.execution.usage import Usage, record
from mpromptune.lms.adapters import Keeping, keep_nothing
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import note_call
from mpromptune.lms.metering import measured
from mpromptune.mipro import proposal
from mpromptune.mipro.checkpoint import DemoSets
from mpromptune.mipro.estimate import demo_numbers
from mpromptune.mipro.run import Run, Threads, max_errors
from mpromptune.show.view import BOOTSTRAPPING

logger = logging.getLogger(__name__)


def demo_sets(run: Run, given: Mapping[str, Any]) -> DemoSets:
    """Step 1: the demo sets of each predictor. ``given`` are DSPy's arguments of this step, by name."""
    checkpoint, program, trainset = run.checkpoint, given["program"], given["trainset"]
    with run.step("bootstrap"):
        kept = None if checkpoint is None else checkpoint.demo_sets()
        is_proposed = checkpoint is not None and checkpoint.instructions() is not None
        number = given["num_fewshot_candidates"]
        bar = run.view.bar(BOOTSTRAPPING, number, "demo sets")
        # DSPy checks student and teacher here, before any call. All random draws are made here too, even if
        # the sets are known.
        build = _prepared(run, given, bar.advance)
        run.score_first(program)
        if not is_proposed and run.num_threads > 1:
            proposal.begin(run, program, trainset)
        if kept is not None:
            logger.info("The demo sets of an interrupted run are used again.")
            bar.advance(number)
            return kept
        demos = build()
        if (down := run.threads.attempts.down) is not None:  # failures are due to an outage, not the teacher
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
    """Do all of DSPy's ``create_n_fewshot_demo_sets`` that needs no LM: every random draw, in DSPy's order.

    Arguments are those of that function and of ``BootstrapFewShot``. ``on_set`` is called after every set, in
    order. ``keep`` makes the context of an attempt, from the numbers of its set and its example.

    Returns:
        A function that bootstraps all sets at the same time, and returns those of each predictor. Without
        bootstrapped demos (where DSPy draws from an empty range and crashes), the first set is empty and
        all others are random labelled examples.
    """
    label = LabeledFewShot(k=max_labeled_demos).compile
    settings["max_labeled_demos"] = max_labeled_demos
    makers: list[Callable[[], Any]] = []
    # All ``compile`` methods of DSPy are called in this thread: hooks in them, such as MLflow's autologging,
    # treat calls in another thread as separate compiles.
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
            bootstrap = SetBootstrap(threads, partial(keep, number), max_bootstrapped_demos=size, **settings)
            makers.append(bootstrap.prepared(student, teacher, examples))
    return partial(_made, makers, on_set)


def _same(program: Any) -> Any:
    return program


def _made(makers: list[Callable[[], Any]], on_set: Callable[[], None]) -> DemoSets:
    programs: list[Any] = []
    # One thread for each set, which only waits; it ends when the threads of the step are closed.
    for future in [in_daemon(partial(contextvars.copy_context().run, maker)) for maker in makers]:
        programs.append(result_of(future))
        on_set()
    predictors = zip(*(program.predictors() for program in programs), strict=True)
    return {i: [predictor.demos for predictor in some] for i, some in enumerate(predictors)}


class SetBootstrap(BootstrapFewShot):
    """DSPy's bootstrap of one set; each attempt is retried, counted and saved, in a thread of a pool.

    Attempts are made one after another as in DSPy, so no call is made that DSPy would not make.
    """

    error_count: int
    max_errors: int

    def __init__(self, threads: Threads, keep: Keeping, **settings: Any) -> None:
        super().__init__(**settings)
        self._threads = threads
        self._keep = keep

    def prepared(self, student: Any, teacher: Any, trainset: list[Any]) -> Callable[[], Any]:
        """Do the part of DSPy's ``compile`` that needs no LM; return a function that does the rest."""
        self.trainset = trainset
        self._prepare_student_and_teacher(student, teacher)
        self._prepare_predictor_mappings()
        return self._bootstrapped

    def _bootstrapped(self) -> Any:
        self.name2traces: dict[str, list[Any]] = {name: [] for name in self.name2predictor}
        accepted: set[int] = set()
        for index in range(len(self.trainset)):
            if len(accepted) >= self.max_bootstrapped_demos:
                break
            if self._threads.submit(self._succeeds, index).result():
                accepted.add(index)
        self.validation = [x for i, x in enumerate(self.trainset) if i not in accepted]
        random.Random(0).shuffle(self.validation)
        self.student = self._train()
        self.student._compiled = True
        return self.student

    def _succeeds(self, index: int) -> bool:
        """Whether an example gives a demo; its errors are counted as in DSPy."""
        errors, limit = self.error_count, self.max_errors
        self.error_count, self.max_errors = 0, 1  # so that DSPy raises each error that it counts
        demos = [predictor.demos for predictor in self.teacher.predictors()]
        try:
            return self._threads.attempts(partial(self._attempt, index, demos))
        except Exception as error:
            is_counted = self.error_count or isinstance(error, CallCancelledError)
            if not is_counted or classify(error) is Verdict.STOP or errors + 1 >= limit:
                raise
            check_stopped()  # what fails after the end, such as an executor that is closed, is no news
            errors += 1
            if classify(error) not in INFRASTRUCTURE:  # outages are logged where calls are tried again
                shown = self.trainset[index], self.metric, error
                logger.error("Failed to run or to evaluate example %s with %s due to %s.", *shown)
            return False
        finally:
            self.error_count, self.max_errors = errors, limit

    def _attempt(self, index: int, demos: list[Any]) -> bool:
        for predictor, own in zip(self.teacher.predictors(), demos, strict=True):
            predictor.demos = own  # a failed attempt has removed the example from its demos
        with measured() as meter, self._keep(index), blaming():
            record(Usage(program_calls=1))
            succeeds = bool(contained(self._bootstrap_one_example, self.trainset[index]))
        note_call(meter.total)
        return succeeds
