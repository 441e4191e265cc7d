"""The steps of one compile before the search, as concurrently as they can be: demo sets and instructions.

They wait for one another most of the time; the threads that this leaves idle score the student.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import dspy
from dspy.teleprompt.mipro_optimizer_v2 import (
    BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
    LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT,
)
from dspy.teleprompt.utils import get_signature

from mpromptune import bootstrap, proposal
from mpromptune.execution import Score, Verdict
from mpromptune.interrupts import GRACE
from mpromptune.lm_errors import classify
from mpromptune.programs import ProgramScorer, ProgramSpace
from mpromptune.progress import Display
from mpromptune.schedule import Minibatches
from mpromptune.threads import Threads

logger = logging.getLogger(__name__)

_FLAGS = (
    "view_data_batch_size",
    "program_aware_proposer",
    "data_aware_proposer",
    "tip_aware_proposer",
    "fewshot_aware_proposer",
)
_BOOTSTRAP = (
    "teacher",
    "num_fewshot_candidates",
    "max_bootstrapped_demos",
    "max_labeled_demos",
    "max_errors",
    "metric_threshold",
)
_PROPOSAL = (*_FLAGS, "demo_candidates", "num_instruct_candidates")


class Steps:
    """Runs MIPROv2's first two steps with the results that its own serial loops have.

    `score_ahead` has idle threads measure the student meanwhile, and `scored_ahead` hands that on.

    Args:
        optimizer: The ``dspy.MIPROv2``; its ``rng`` is drawn from as DSPy does.
        threads: LM calls at a time.
        compile_arguments: Of ``dspy.MIPROv2.compile``, with defaults.
        grace: Seconds that LM calls under way are left after an error or an interrupt.
    """

    def __init__(
        self, optimizer: Any, threads: int, compile_arguments: Mapping[str, Any], grace: float = GRACE
    ) -> None:
        self.display = Display()
        self._optimizer = optimizer
        self._threads = Threads(threads, grace)
        self._arguments = compile_arguments
        self._flags = {name: compile_arguments.get(name) for name in _FLAGS}
        self._proposals = proposal.Proposals(optimizer, self._threads)
        self._traceback = compile_arguments.get("provide_traceback")
        self._valset: list[Any] | None = None
        self._ahead: _Ahead | None = None

    def score_ahead(self, valset: list[Any]) -> None:
        """From the first step on, threads that it leaves idle score the student on ``valset``."""
        self._valset = valset

    def scored_ahead(self, programs: ProgramSpace, valset: list[Any], score: Score) -> Score:
        """``score``, but for what is known already; after `close_threads`."""
        ahead = self._ahead
        if ahead is None or programs.program is not ahead.program or valset is not ahead.valset:
            return score
        return partial(ahead.score_or, score, programs.baseline)

    def minibatches(self, enabled: bool) -> Minibatches:
        """DSPy's arguments of its search step; ``auto`` decides whether there are minibatches."""
        size, steps = (self._arguments[f"minibatch_{name}"] for name in ("size", "full_eval_steps"))
        return Minibatches(size, steps, enabled)

    def demo_sets(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Demo sets; ``stock`` is the serial method, which also says what the arguments mean."""
        given = _bind(stock, (program, trainset, *args), kwargs)
        if proposal.is_supported() and None not in self._flags.values():
            self._proposals.start(program, trainset, self._flags)
        self._begin_ahead(program, trainset)
        number, labelled = given.get("num_fewshot_candidates", 0), given.get("max_labeled_demos", 0)
        if given.get("max_bootstrapped_demos") == 0 and labelled > 0:
            return bootstrap.labelled_demo_sets(program, trainset, number, labelled, self._optimizer.rng)
        if not bootstrap.is_supported() or not set(_BOOTSTRAP) <= given.keys():
            return _serially("bootstrap", stock, program, trainset, *args, **kwargs)
        bar = self.display.bar("Bootstrapping", number, "demo sets")
        plan = self._plan(program, trainset, given)
        return plan.build(self._optimizer.rng, self._threads, bar.advance)

    def _begin_ahead(self, program: Any, trainset: Any) -> None:
        """Leaves out what the bootstrap may be asking for just now: the search finds that in the cache."""
        if self._valset is None:
            return
        student = ProgramSpace(program, {i: [] for i, _ in enumerate(program.predictors())}, None)
        scorer = ProgramScorer(
            student, self._valset, self._optimizer.metric, wants_traceback(self._traceback)
        )
        score = partial(scorer, student.baseline)
        self._ahead = _Ahead(program, self._valset, score, _max_errors(self._optimizer.max_errors))
        bootstrapped = {hash(repr(example)) for example in trainset}
        others = [i for i, x in enumerate(self._valset) if hash(repr(x)) not in bootstrapped]
        self._threads.fill(self._ahead.calls(others))

    def _plan(self, program: Any, trainset: Any, given: Mapping[str, Any]) -> bootstrap.DemoSetPlan:
        """As MIPROv2 has it: a zero-shot run bootstraps demos too, for the proposer to look at."""
        bootstrapped, labelled = given["max_bootstrapped_demos"], given["max_labeled_demos"]
        if bootstrapped == 0 and labelled == 0:
            bootstrapped = BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT
            labelled = LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT
        return bootstrap.DemoSetPlan(
            student=program,
            teacher=given["teacher"],
            trainset=trainset,
            num_candidate_sets=given["num_fewshot_candidates"],
            max_labeled_demos=labelled,
            max_bootstrapped_demos=bootstrapped,
            metric=self._optimizer.metric,
            metric_threshold=given["metric_threshold"],
            max_errors=_max_errors(given["max_errors"]),
            teacher_settings=self._optimizer.teacher_settings,
        )

    def instructions(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Instructions, the first of each predictor its own; ``stock`` as in `demo_sets`."""
        given = _bind(stock, (program, trainset, *args), kwargs)
        if not proposal.is_supported() or not set(_PROPOSAL) <= given.keys():
            return _serially("proposal", stock, program, trainset, *args, **kwargs)
        number, demos = given["num_instruct_candidates"], given["demo_candidates"]
        each = min(number, max(len(demos[0]), 1)) if demos else number
        bar = self.display.bar("Proposing", each * len(program.predictors()), "instructions")
        flags = {name: given[name] for name in _FLAGS}
        proposed = self._proposals.instructions(program, trainset, demos, number, flags, bar.advance)
        for i, predictor in enumerate(program.predictors()):
            proposed[i][0] = get_signature(predictor).instructions
        return proposed

    def close_threads(self) -> None:
        """Starts no further LM call."""
        self._threads.close()

    def close(self) -> None:
        """Ends what is still running, and the display; after an error, nothing waits for long."""
        try:
            self._threads.close(self._threads.grace)
        finally:
            self.display.close()


class _Ahead:
    """Scores of the student that a search ends up with in any case, whatever it finds.

    It ends where the bootstrap would: after ``max_errors`` errors, or one that is not the program's own.
    """

    def __init__(
        self, program: Any, valset: list[Any], score: Callable[[int], float], max_errors: int
    ) -> None:
        self.program = program
        self.valset = valset
        self._score = score
        self._max_errors = max_errors
        self._outcomes: dict[int, float | Exception] = {}

    def calls(self, examples: list[int]) -> Iterator[Callable[[], None]]:
        """One for each example, for as long as there is hope."""
        for example in examples:
            if self._is_hopeless():
                return
            yield partial(self._measure, example)

    def _is_hopeless(self) -> bool:
        errors = [o for o in tuple(self._outcomes.values()) if isinstance(o, Exception)]
        foreign = any(classify(error) is not Verdict.CANDIDATE for error in errors)
        return foreign or len(errors) >= self._max_errors

    def _measure(self, example: int) -> None:
        try:
            self._outcomes[example] = self._score(example)
        except Exception as error:  # noqa: BLE001 - raised where the score is asked for
            self._outcomes[example] = error

    def score_or(self, score: Score, student: dict[str, int], params: dict[str, int], example: int) -> float:
        """What came of it, once: after an error, another attempt is a call of its own."""
        outcome = self._outcomes.pop(example, None) if params == student else None
        if isinstance(outcome, Exception):
            raise outcome
        return score(params, example) if outcome is None else outcome


def wants_traceback(own: bool | None) -> bool:
    """DSPy's ``provide_traceback``, which its settings decide unless it is given."""
    return bool(dspy.settings.provide_traceback if own is None else own)


def _max_errors(own: int | None) -> int:
    return int(dspy.settings.max_errors if own is None else own)


def _bind(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(stock).bind(*args, **kwargs).arguments)


def _serially(step: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    logger.warning("The %s step of DSPy %s is not known; running it serially.", step, dspy.__version__)
    return stock(*args, **kwargs)
