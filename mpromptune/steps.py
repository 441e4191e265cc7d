"""The steps of one compile before the search: demo sets and instructions, as concurrently as they can be."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import dspy
from dspy.teleprompt.mipro_optimizer_v2 import (
    BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
    LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT,
)
from dspy.teleprompt.utils import get_signature

from mpromptune import bootstrap, proposal
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

    Args:
        optimizer: The ``dspy.MIPROv2``; its ``rng`` is drawn from as DSPy does.
        threads: LM calls at a time.
        compile_arguments: Of ``dspy.MIPROv2.compile``, with defaults.
    """

    def __init__(self, optimizer: Any, threads: int, compile_arguments: Mapping[str, Any]) -> None:
        self.display = Display()
        self._optimizer = optimizer
        self._threads = Threads(threads)
        self._arguments = compile_arguments
        self._flags = {name: compile_arguments.get(name) for name in _FLAGS}
        self._proposals = proposal.Proposals(optimizer, self._threads)

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
        number, labelled = given.get("num_fewshot_candidates", 0), given.get("max_labeled_demos", 0)
        if given.get("max_bootstrapped_demos") == 0 and labelled > 0:
            return bootstrap.labelled_demo_sets(program, trainset, number, labelled, self._optimizer.rng)
        if not bootstrap.is_supported() or not set(_BOOTSTRAP) <= given.keys():
            return _serially("bootstrap", stock, program, trainset, *args, **kwargs)
        bar = self.display.bar("Bootstrapping", number, "demo sets")
        plan = self._plan(program, trainset, given)
        return plan.build(self._optimizer.rng, self._threads, bar.advance)

    def _plan(self, program: Any, trainset: Any, given: Mapping[str, Any]) -> bootstrap.DemoSetPlan:
        """As MIPROv2 has it: a zero-shot run bootstraps demos too, for the proposer to look at."""
        bootstrapped, labelled = given["max_bootstrapped_demos"], given["max_labeled_demos"]
        if bootstrapped == 0 and labelled == 0:
            bootstrapped = BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT
            labelled = LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT
        errors = given["max_errors"]
        return bootstrap.DemoSetPlan(
            student=program,
            teacher=given["teacher"],
            trainset=trainset,
            num_candidate_sets=given["num_fewshot_candidates"],
            max_labeled_demos=labelled,
            max_bootstrapped_demos=bootstrapped,
            metric=self._optimizer.metric,
            metric_threshold=given["metric_threshold"],
            max_errors=dspy.settings.max_errors if errors is None else errors,
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
        """Ends what is still running, and the display."""
        self.close_threads()
        self.display.close()


def _bind(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(stock).bind(*args, **kwargs).arguments)


def _serially(step: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    logger.warning("The %s step of DSPy %s is not known; running it serially.", step, dspy.__version__)
    return stock(*args, **kwargs)
