"""The steps of one compile before the search, as concurrently as they can be: demo sets and instructions.

They wait for one another most of the time; the threads that this leaves idle score the student.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

from dspy.teleprompt.utils import get_signature
from optuna.storages import BaseStorage
from optuna.study import Study

from mpromptune.engine.schedule import Minibatches
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.attempts import INFRASTRUCTURE, RetryPolicy, Verdict
from mpromptune.execution.interrupts import GRACE, Stopped, is_over, result_of
from mpromptune.execution.limits import SEARCH, patience
from mpromptune.execution.pool import Score
from mpromptune.execution.usage import Usage, record
from mpromptune.lms.errors import classify
from mpromptune.lms.guard import Guard, measured
from mpromptune.lms.kept import keeping, reusing
from mpromptune.lms.threads import Threads
from mpromptune.mipro import bootstrap, concurrent_bootstrap, proposal
from mpromptune.mipro.ahead import Ahead
from mpromptune.mipro.checkpoint import Checkpoint
from mpromptune.mipro.configurations import ProgramScorer, ProgramSpace, wants_traceback
from mpromptune.mipro.estimate import Estimate, Plan, estimate
from mpromptune.mipro.evaluations import Predictions
from mpromptune.mipro.fingerprint import Part
from mpromptune.mipro.labelled import is_labelled_only, labelled_demo_sets
from mpromptune.mipro.metric import CheckedMetric
from mpromptune.mipro.remote import Elsewhere
from mpromptune.mipro.stock import bind, serially
from mpromptune.show.screens import choose
from mpromptune.show.view import Bar, View
from mpromptune.storage.lease import Lease, held

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
        guard: Watches the LM requests.
        grace: Seconds that LM calls under way are left after an error or an interrupt.
        retry: How often and how patiently errors of the infrastructure are retried.
        verbose: Whether there is anything to see of it.

    Attributes:
        arguments: Those of the compile.
        view: What there is to see of all three steps.
        metric: The optimizer's; where it cannot score, no further call is begun.
        predictions: Of what is scored, for those who listen to DSPy's evaluations.
        elsewhere: The executor of the search.
        holding: Gives back the lease of the study, if there is one.
    """

    elsewhere: Elsewhere

    def __init__(
        self,
        optimizer: Any,
        threads: int,
        compile_arguments: Mapping[str, Any],
        guard: Guard | None = None,
        grace: float = GRACE,
        retry: RetryPolicy | None = None,
        verbose: bool = True,
    ) -> None:
        self.guard = guard or Guard()
        self.predictions = Predictions()
        self._optimizer = optimizer
        self._number = threads
        self._threads = pool = Threads(threads, grace, retry, self.guard.budget.admits)
        self.metric = CheckedMetric(optimizer.metric, pool.end)
        self.view = View(choose if verbose else lambda: None, self.guard.budget, lambda: pool.load)
        self._timeout = None if retry is None else retry.timeout
        self.arguments = compile_arguments
        self._flags = {name: compile_arguments.get(name) for name in _FLAGS}
        keep = partial(self._keeping, "propose")
        self._proposals = proposal.Proposals(optimizer, self._threads, keep, self.metric.wait)
        self._traceback = compile_arguments.get("provide_traceback")
        self._valset: list[Any] | None = None
        self._first: Sequence[int] = ()
        self.seed = 0  # of the search, once DSPy has said so
        self._ahead: Ahead | None = None
        self._checkpoint: Checkpoint | None = None
        self.holding = ExitStack()
        self._lease: Lease | None = None
        self.search_calls = self.instructions_wanted = 0  # what DSPy makes of the compile's arguments

    @property
    def storage(self) -> BaseStorage | None:
        """The storage of this run, opened, where one was given."""
        return None if self._checkpoint is None else self._checkpoint.study._storage

    def resume(self, study: Study, run: Mapping[str, Part]) -> None:
        """Takes from the study what an interrupted run has paid for, and keeps in it what this one does.

        Raises:
            StudyInUseError: Another run is at work on it.
            StudyMismatchError: It belongs to another run, with another ``run`` (see `fingerprint`).
        """
        self._lease = self.holding.enter_context(held(study, self.guard.stopped))
        self._checkpoint = Checkpoint(self._lease, run)
        for step, usage in self._checkpoint.usage().items():
            self.guard.budget.step(step).add(usage)

    def estimate(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Estimate:
        """What all steps would use; arguments as in `demo_sets`, `search_calls` and so on being set."""
        given = bind(stock, (program, trainset, *args), kwargs)
        plan = Plan.of(given, self._flags, self.instructions_wanted, self.search_calls)
        task, prompt = self._optimizer.task_model, self._optimizer.prompt_model
        price = self.guard.pricing.of
        return estimate(plan, price(task, task.model), price(prompt, prompt.model))

    def score_ahead(self, valset: list[Any], examples: Sequence[int]) -> None:
        """From the first step on, threads that it leaves idle score the student on ``valset``."""
        self._valset, self._first = valset, examples

    def scored_ahead(self, programs: ProgramSpace, valset: list[Any], score: Score) -> Score:
        """``score``, but for what is known already; after `close_threads`."""
        score = reusing(self._checkpoint, score)
        ahead = self._ahead
        if ahead is None or programs.program is not ahead.program or valset is not ahead.valset:
            return score
        if self._checkpoint is not None:
            ahead.forget(self._checkpoint.measured(programs.baseline))
        return partial(ahead.score_or, score, programs.baseline)

    def minibatches(self, enabled: bool) -> Minibatches:
        """DSPy's arguments of its search step; ``auto`` decides whether there are minibatches."""
        size, steps = (self.arguments[f"minibatch_{name}"] for name in ("size", "full_eval_steps"))
        return Minibatches(size, steps, enabled)

    def demo_sets(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Demo sets; ``stock`` is the serial method, which also says what the arguments mean."""
        with self._step("bootstrap"):
            return self._demo_sets(stock, program, trainset, *args, **kwargs)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Counts what a step uses; a limit, or the infrastructure, ends it with an error that says so."""
        budget, began = self.guard.budget, time.monotonic()
        meter = budget.step(name)
        before = meter.total.lm_calls
        try:
            with measured(meter):
                yield
                record(Usage(seconds=time.monotonic() - began))
            if self._failure is not None:
                raise self._failure
        except Exception as error:
            if error is self._failure or classify(error) in {Verdict.STOP, *INFRASTRUCTURE}:
                raise self._stopped(name, error) from error
            raise
        except Stopped as stop:
            if self._failure is not None:
                raise self._stopped(name, self._failure) from self._failure
            if budget.reached is None:
                raise
            raise budget.used_up(f"in the {name} step, before the search began") from stop
        finally:
            if self._checkpoint is not None and meter.total.lm_calls > before:
                self._checkpoint.keep_usage(name, meter.total)

    @property
    def _failure(self) -> Exception | None:
        """What makes every further call vain."""
        return self.metric.failure or (None if self._lease is None else self._lease.lost)

    def _stopped(self, name: str, error: Exception) -> SearchStoppedError:
        return SearchStoppedError(
            f"The {name} step stopped on {type(error).__name__}: {error}. What was made before is kept in "
            "the storage, if one was given."
        )

    def _demo_sets(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        checkpoint, rng, step = self._checkpoint, self._optimizer.rng, self.guard.budget.step
        kept = None if checkpoint is None else checkpoint.demo_sets(rng)
        given = bind(stock, (program, trainset, *args), kwargs)
        # What DSPy refuses about student and teacher it refuses here, before any call.
        build = self._prepared(stock, given) if kept is None else None
        proposed = checkpoint is not None and checkpoint.has_instructions
        supported = proposal.is_supported() and None not in self._flags.values()
        if supported and not proposed and self._number > 1:
            with measured(step("propose")):
                self._proposals.start(program, trainset, self._flags)
        with measured(step(SEARCH)):
            idle = not proposed or kept is None
            self._begin_ahead(program, trainset, idle, alone=kept is None and is_labelled_only(given))
        if build is None:
            logger.info("The demo sets are those that an interrupted run has bootstrapped.")
            number = len(kept[0]) if kept else 0
            self._bootstrap_bar(number).advance(number)
            self.metric.known.set()
            return kept
        demos = build()
        self.metric.known.set()
        if self._threads.attempts.down is not None:  # an outage, not a bad teacher
            raise self._threads.attempts.down.__cause__ or self._threads.attempts.down
        return demos if checkpoint is None else checkpoint.keep_demo_sets(program, demos, rng)

    def _prepared(self, stock: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Any]:
        """What makes the demo sets, once called."""
        rng, number = self._optimizer.rng, given.get("num_fewshot_candidates", 0)
        student = given["program"], given["trainset"]
        if is_labelled_only(given):
            return partial(labelled_demo_sets, *student, number, given["max_labeled_demos"], rng)
        if not concurrent_bootstrap.is_supported() or not set(_BOOTSTRAP) <= given.keys():
            return partial(serially, "bootstrap", stock, given)
        plan = bootstrap.DemoSetPlan.of(self._optimizer, self.metric, *student, given)
        on_set, keep = self._bootstrap_bar(number).advance, partial(self._keeping, "bootstrap")
        return plan.prepared(rng, self._threads, on_set, keep)

    def _bootstrap_bar(self, number: int) -> Bar:
        return self.view.bar("Bootstrapping", number, "demo sets")

    def _proposal_bar(self, number: int) -> Bar:
        return self.view.bar("Proposing", number, "instructions")

    def _begin_ahead(self, program: Any, trainset: Any, idle: bool, alone: bool) -> None:
        """Leaves out what the bootstrap may be asking for just now: the search finds that in the cache.

        Without ``idle`` threads there is only what an interrupted run has scored. ``alone``, it waits for
        the first score: nothing else would show whether the metric works before the proposals are paid.
        """
        if self._valset is None:
            return
        student = ProgramSpace(program, {i: [] for i, _ in enumerate(program.predictors())}, None)
        scorer = ProgramScorer(
            student,
            self._valset,
            self.metric,
            wants_traceback(self._traceback),
            keep=lambda _, example, prediction: self.predictions.keep(None, example, prediction),
        )
        score = partial(scorer, student.baseline)
        limit = bootstrap.max_errors(self._optimizer.max_errors)
        keep = partial(self._keeping, SEARCH)
        self._ahead = Ahead(program, self._valset, score, limit, self._checkpoint, keep)
        if not idle:
            return
        bootstrapped = {hash(repr(example)) for example in trainset}
        others = [i for i in self._first if hash(repr(self._valset[i])) not in bootstrapped]
        calls = self._ahead.calls(others)
        for first in islice(calls, int(alone)):
            result_of(self._threads.submit(first))
        self._threads.fill(calls)

    def _keeping(self, step: str, *name: object) -> AbstractContextManager[None]:
        """What LMs answer in here is paid for once, whatever becomes of this process."""
        # The search counts what its scores have used, wherever they come from.
        meter = None if step == SEARCH else self.guard.budget.step(step)
        return keeping(self._checkpoint, ":".join(map(str, (step, *name))), meter)

    def instructions(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Instructions, the first of each predictor its own; ``stock`` as in `demo_sets`."""
        with self._step("propose"):
            return self._instructions(stock, program, trainset, *args, **kwargs)

    def _instructions(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        kept = None if self._checkpoint is None else self._checkpoint.instructions()
        if kept is not None:
            logger.info("The instructions are those that an interrupted run has proposed.")
            number = sum(map(len, kept.values()))
            self._proposal_bar(number).advance(number)
            return kept
        proposed = self._proposed(stock, program, trainset, *args, **kwargs)
        if self._checkpoint is not None:
            self._checkpoint.keep_instructions(proposed)
        return proposed

    def _proposed(
        self, stock: Callable[..., Any], program: Any, trainset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given = bind(stock, (program, trainset, *args), kwargs)
        if not proposal.is_supported() or not set(_PROPOSAL) <= given.keys():
            return serially("proposal", stock, given)
        number, demos = given["num_instruct_candidates"], given["demo_candidates"]
        each = min(number, max(len(demos[0]), 1)) if demos else number
        bar = self._proposal_bar(each * len(program.predictors()))
        flags = {name: given[name] for name in _FLAGS}
        proposed = self._proposals.instructions(program, trainset, demos, number, flags, bar.advance)
        for i, predictor in enumerate(program.predictors()):
            proposed[i][0] = get_signature(predictor).instructions
        return proposed

    def close_threads(self) -> None:
        """Starts no further call; those under way are waited for, unless they seem to hang.

        Raises:
            Stopped: A limit leaves the search no time to begin.
        """
        usage = self.guard.budget.usage.get(SEARCH, Usage())  # of scores made ahead
        most = math.inf if self._timeout is None else self._timeout
        self._threads.finish(patience(usage, usage.program_calls, self._threads.grace, most))
        if is_over():
            raise Stopped

    def close(self) -> None:
        """Ends what is still running, and the view; after an error, nothing waits for long."""
        try:
            self._threads.close(self._threads.grace)
        finally:
            self.view.close()
