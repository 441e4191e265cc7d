"""Demo sets: those of DSPy's bootstrap, built at the same time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import dspy
from dspy.teleprompt import LabeledFewShot
from dspy.teleprompt.mipro_optimizer_v2 import (
    BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
    LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT,
)

from mpromptune.execution.interrupts import result_of
from mpromptune.lms.kept import Keeping, keep_nothing
from mpromptune.lms.threads import Threads
from mpromptune.mipro.concurrent_bootstrap import ConcurrentBootstrap, Turns
from mpromptune.mipro.demos import DemoSets


def max_errors(own: int | None) -> int:
    """DSPy's ``max_errors``, which its settings decide unless it is given."""
    return int(dspy.settings.max_errors if own is None else own)


def demos_wanted(given: Mapping[str, Any]) -> tuple[int, int]:
    """Bootstrapped and labelled demos of a set; a zero-shot run has some too, for the proposer to look at."""
    bootstrapped, labelled = given["max_bootstrapped_demos"], given["max_labeled_demos"]
    if bootstrapped == labelled == 0:
        return BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT, LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT
    return bootstrapped, labelled


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
    def of(
        cls, optimizer: Any, metric: Any, student: Any, trainset: list[Any], given: Mapping[str, Any]
    ) -> DemoSetPlan:
        """As MIPROv2 has it."""
        bootstrapped, labelled = demos_wanted(given)
        return cls(
            student=student,
            teacher=given["teacher"],
            trainset=trainset,
            num_candidate_sets=given["num_fewshot_candidates"],
            max_labeled_demos=labelled,
            max_bootstrapped_demos=bootstrapped,
            metric=metric,
            metric_threshold=given["metric_threshold"],
            max_errors=given["max_errors"],
            teacher_settings=optimizer.teacher_settings,
        )

    def prepared(
        self,
        rng: random.Random,
        threads: Threads,
        on_set: Callable[[], None] = lambda: None,
        keep: Keeping = keep_nothing,
    ) -> Callable[[], DemoSets]:
        """Does all that needs no LM; what is returned then builds all sets at the same time.

        They are those of DSPy's serial loop.

        Args:
            rng: Drawn from exactly as DSPy does.
            threads: Run the program calls.
            on_set: Called after every set, in order.
            keep: Of the attempts, each named by the numbers of its set and its example.

        Returns:
            Called once, it returns the demo sets of each predictor.
        """
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

    def _draw(self, rng: random.Random, threads: Threads, keep: Keeping) -> list[Callable[[], Any]]:
        """What makes each set's program, with everything random drawn in DSPy's order.

        All ``compile`` methods of DSPy's are called here: what is hooked into them, MLflow's
        autologging for one, takes those of another thread for compiles by themselves.
        """
        makers: list[Callable[[], Any]] = []
        turns = Turns()
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
            bootstrap = ConcurrentBootstrap(threads, turns, partial(keep, number), **self._settings(size))
            makers.append(bootstrap.prepared(self.student, self.teacher, trainset))
        return makers

    def _settings(self, size: int) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "metric_threshold": self.metric_threshold,
            "max_errors": max_errors(self.max_errors),
            "max_bootstrapped_demos": size,
            "max_labeled_demos": self.max_labeled_demos,
            "teacher_settings": dict(self.teacher_settings),
        }


def _same(program: Any) -> Any:
    return program


def _append(demos: DemoSets, program: Any) -> None:
    for i, predictor in enumerate(program.predictors()):
        demos[i].append(predictor.demos)
