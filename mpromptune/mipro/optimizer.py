"""MIPROv2: DSPy's optimizer with a concurrent, text-aware search.

The methods of the class are in the order in which DSPy's own ``compile`` calls them. Without options each one
passes its arguments to DSPy's method, so that DSPy's own search works even if DSPy changes these methods.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import dspy

# Imported from its own module, because `dspy.MIPROv2` may have been replaced, even by our class.
from dspy.teleprompt.mipro_optimizer_v2 import MIPROv2 as StockMIPROv2
from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.engine.arguments import extending, gather, resolve, split
from mpromptune.engine.growth import most_requests
from mpromptune.engine.minibatches import Minibatches
from mpromptune.engine.plan import Task
from mpromptune.engine.proposers import Proposer, check_components
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import SearchInterrupted, SearchStoppedError, at_callers_line
from mpromptune.execution.interrupts import handled
from mpromptune.lms.errors import classify, retry_after
from mpromptune.mipro import bootstrap, proposal
from mpromptune.mipro.adaptive import keep_gains, proposers_of
from mpromptune.mipro.checks import check_arguments, check_embedder, incompatible, require_compatible
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace, scorer
from mpromptune.mipro.estimate import Estimate, estimate, interceptor
from mpromptune.mipro.fingerprint import fingerprint
from mpromptune.mipro.remote import remote_programs
from mpromptune.mipro.results import attach_statistics, forget_statistics, percent
from mpromptune.mipro.run import Run, wants_traceback
from mpromptune.show.progress import together
from mpromptune.show.view import SEARCHING
from mpromptune.storage.attributes import ESTIMATE, PREDICTORS
from mpromptune.storage.storage import open_study

logger = logging.getLogger(__name__)

_STOCK_INIT = inspect.signature(StockMIPROv2.__init__)
_STOCK_COMPILE = inspect.signature(StockMIPROv2.compile)
# The compile that runs in this context; None means DSPy's own search.
_RUN: ContextVar[Run | None] = ContextVar("mpromptune_run", default=None)


class _Planned(BaseException):
    """Ends a compile before its first LM call; not an ``Exception``, which would count as a failure."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(str(estimate))
        self.estimate = estimate


class MIPROv2(StockMIPROv2):
    """A drop-in ``dspy.MIPROv2`` that can evaluate many prompt configurations at once.

    Without a sampler it makes exactly the calls of DSPy's optimizer. With a sampler, the search step proposes
    batches of configurations, measures them concurrently on small blocks of the validation set, and returns
    the configuration with the highest posterior mean, compared with the baseline.

    Args:
        *args: Arguments of ``dspy.MIPROv2``.
        sampler_config: Options of the search (see `mpromptune.engine.options.SearchOptions`), such as
            ``"sampler"``: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"`` or an Optuna sampler.
        **kwargs: Arguments of ``dspy.MIPROv2``, or single options as in ``sampler_config``.

    Raises:
        UnknownOptionError: An option is unknown (a TypeError).
        InvalidArgumentError: An option is out of range, or given twice (a ValueError).

    Example:
        >>> optimizer = MIPROv2(metric=metric, auto="light", num_threads=16)
        >>> best = optimizer.compile(program, trainset=trainset, sampler_config={"sampler": "qei"})
        >>> best.score, best.search_result.calls
    """

    @extending(_STOCK_INIT)
    def __init__(self, *args: Any, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        with at_callers_line:
            ours, stock = split(kwargs, _STOCK_INIT, {"compile": _STOCK_COMPILE})
            if ours.get("verbose") is not None:
                ours["verbose"] = bool(ours["verbose"])  # DSPy accepts any value
            self._defaults = gather(sampler_config, ours)
            resolve(self._defaults, {})  # check the options now rather than after the bootstrap
        super().__init__(*args, **stock)

    @extending(_STOCK_COMPILE)
    def compile(self, student: Any, *, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Optimize ``student``.

        Args:
            student: The program.
            sampler_config: Options of the search; they override those of the constructor.
            **kwargs: Arguments of ``dspy.MIPROv2.compile`` (``trainset``, ``valset``, ...), or
                single options as in ``sampler_config``.

        Returns:
            The best program, with ``score``, ``trial_logs``, ``candidate_programs`` and
            ``mb_candidate_programs`` as DSPy sets them, and ``search_result`` if a sampler was used. With
            ``dry_run``, an `mpromptune.mipro.estimate.Estimate` instead.

        Raises:
            UnknownOptionError: An option is unknown (a TypeError).
            InvalidArgumentError: An option or an argument is not valid (a ValueError).
            IncompatibleDSPyError: There are options, and this version of DSPy does not support them.
            StudyInUseError: Another run uses the study.
            TravelError: Something cannot be sent to the workers of the executor (a TypeError).
            SearchStoppedError: No further call could succeed; ``.study`` has all scores, and ``.program``
                is the best program so far.
            SearchInterrupted: Ctrl-C or SIGTERM (a KeyboardInterrupt), with the same attributes.
        """
        with at_callers_line:
            ours, stock = split(kwargs, _STOCK_COMPILE, {"MIPROv2's constructor": _STOCK_INIT})
            options = resolve(self._defaults, {**gather(sampler_config, ours), **interceptor().options})
            if options is not None:
                require_compatible(self)
                check_arguments(self, student, stock, options.reflection_lm)
        interceptor().on_options(options)
        if options is None:
            with _current(None):
                return super().compile(student, **stock)
        defaults = {p.name: p.default for p in _STOCK_COMPILE.parameters.values()}
        run = Run(self, student, options, {**defaults, **stock})
        try:
            with at_callers_line, handled(), _current(run), run.under_way():
                if options.dry_run:  # without the hooks of other packages, since nothing is compiled
                    return inspect.unwrap(StockMIPROv2.compile)(self, student, **stock)
                return super().compile(student, **stock)
        except _Planned as planned:
            return planned.estimate

    def _set_random_seeds(self, *args: Any, **kwargs: Any) -> None:
        run = _RUN.get()
        if run is None:
            super()._set_random_seeds(*args, **kwargs)
        else:  # DSPy treats a seed of 0 as None, and DSPy 3.2 also seeds numpy's global generator
            self.rng = random.Random(run.seed)

    def _set_hyperparams_from_run_mode(self, *args: Any, **kwargs: Any) -> Any:
        """Let DSPy determine the size of the run, then check everything that may be wrong with it."""
        stock = super()._set_hyperparams_from_run_mode
        settings = stock(*args, **kwargs)
        if (run := _RUN.get()) is not None:
            if len(settings) != 5:
                raise incompatible(f"_set_hyperparams_from_run_mode returns {len(settings)} values, not 5")
            with at_callers_line:
                _prepare(run, _named(stock, args, kwargs)["program"], *settings)
        return settings

    def _bootstrap_fewshot_examples(self, *args: Any, **kwargs: Any) -> Any:
        """Step 1: demo sets."""
        stock, run = super()._bootstrap_fewshot_examples, _RUN.get()
        if run is None:
            return stock(*args, **kwargs)
        given = _named(stock, args, kwargs)
        run.trainset = given["trainset"]
        interceptor().on_estimate(partial(_estimate, run, given))
        if run.options.dry_run:
            raise _Planned(_estimate(run, given))
        sizes = run.num_instructions, run.search_calls
        run.estimated = estimate(given, run.arguments, *sizes, written=run.most_written).by_step
        return bootstrap.demo_sets(run, given)

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        """Step 2: instructions."""
        stock, run = super()._propose_instructions, _RUN.get()
        if run is None:
            return stock(*args, **kwargs)
        return proposal.instructions(run, _named(stock, args, kwargs))

    def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Step 3: the search."""
        stock, run = super()._optimize_prompt_parameters, _RUN.get()
        if run is None:
            return stock(*args, **kwargs)
        return _best_program(run, **_named(stock, args, kwargs))


@contextmanager
def _current(run: Run | None) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def _named(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(stock).bind(*args, **kwargs).arguments)


def _prepare(
    run: Run,
    program: Any,
    num_trials: int,
    valset: list[Any],
    minibatch: bool,
    num_instructions: int,
    num_demo_sets: int,
) -> None:
    """Check the run before it pays for anything, and load the checkpoint of an interrupted run."""
    arguments = run.arguments
    minibatches = Minibatches(arguments["minibatch_size"], arguments["minibatch_full_eval_steps"], minibatch)
    run.options = options = run.options.within(len(valset), num_trials, minibatches)
    run.num_instructions = num_instructions
    is_combined = len(program.predictors()) > 1
    task = Task(len(valset), run.search_calls, (), 1, run.seed, is_combined=is_combined)
    plan = options.plan(task, ScoreTable(len(valset)))  # raises an error if a number is not valid
    demo_sets = dict.fromkeys(range(len(program.predictors())), ()) if any(run.demo_limits.values()) else None
    student = ProgramSpace(program, {}, demo_sets)
    proposers = proposers_of(run, student, valset)  # raises an error if one is not valid
    check_components(proposers, space := student.prompt_space())
    run.most_written = most_requests(space, proposers, run.search_calls)
    if options.dry_run:
        return
    if options.storage is not None:
        numbers = num_instructions, num_demo_sets
        identity = fingerprint(run.optimizer, program, valset, numbers, arguments, options)
        run.resume(open_study(options.storage, options.study_name), identity)
    with dspy.context(lm=run.optimizer.task_model), _remote(run, student, valset):
        pass  # this raises an error if something cannot be sent to the workers
    check_embedder(options, run.view, program)
    run.first = next(((valset, example) for example in plan.first), None)


def _estimate(run: Run, given: Mapping[str, Any]) -> Estimate:
    price = run.guard.pricing.of
    task_model, prompt_model = run.optimizer.task_model, run.optimizer.prompt_model
    models = task_model, prompt_model, run.options.reflection_lm or prompt_model
    task, prompt, writing = (price(lm, lm.model) for lm in models)
    sizes = run.num_instructions, run.search_calls
    return estimate(given, run.arguments, *sizes, task, prompt, run.most_written, writing)


def _best_program(
    run: Run,
    program: Any,
    instruction_candidates: dict[int, list[str]],
    demo_candidates: Any,
    evaluate: Any,
    valset: list[Any],
    **sizes: Any,
) -> Any:
    """The winner of the search as a program, with the result; errors have the best program so far.

    The ``sizes`` of the run are those that `_prepare` has put into the options.
    """
    run.end_steps()
    forget_statistics(program)
    programs = ProgramSpace(program, instruction_candidates, demo_candidates)
    run.evaluations.programs, run.evaluations.valset = programs, valset
    try:
        with _remote(run, programs, valset) as remote:
            own = ProgramRunner(programs, valset, run.metric, run.evaluations.keep, run.takes_notes)
            score = scorer(remote or own, wants_traceback(evaluate.provide_traceback))
            score = run.with_first(score, programs, valset)
            proposers = proposers_of(run, programs, valset)
            result = _search(run, programs, score, len(valset), proposers)
    except (SearchInterrupted, SearchStoppedError) as error:
        error.program = program if error.result is None else _finished(run, programs, error.result)
        raise
    keep_gains(run, result.gains)
    run.view.findings = result
    return _finished(run, programs, result)


def _remote(run: Run, programs: ProgramSpace, valset: list[Any]) -> Any:
    metric, timeout = run.optimizer.metric, run.options.timeout
    return remote_programs(run.place, run.guard, timeout, programs, valset, metric, run.takes_notes)


def _search(
    run: Run, programs: ProgramSpace, score: Any, n_examples: int, proposers: Sequence[Proposer]
) -> Any:
    options = run.options
    earlier = 0 if run.checkpoint is None else run.checkpoint.n_scores()
    run.view.bar(SEARCHING, run.search_calls, "calls", earlier)
    # Imported here because it loads torch, after the bootstrap has shown that the program runs.
    from mpromptune.engine.search import search

    ours = {
        "storage": run.storage,
        "callbacks": (_describing(run, programs.program), run.evaluations.on_trial, *options.callbacks),
        "executor": run.place.threads,
        "on_progress": together(run.view.on_progress if options.verbose else None, options.on_progress),
    }
    return search(
        programs.prompt_space(),
        score,
        n_examples=n_examples,
        max_calls=run.search_calls,
        num_threads=run.num_threads,
        baseline=programs.baseline,
        seed=run.seed,
        classify=classify,
        retry_after=retry_after,
        budget=run.budget,
        stopped=run.guard.stopped,
        proposers=proposers,
        candidates=programs,
        **{**options.of_compile, **ours},
    )


def _describing(run: Run, program: Any) -> Callable[[Study, FrozenTrial], None]:
    """A callback that saves data of the compile for reports in the study, with the first trial."""
    described = {
        PREDICTORS: [name for name, _ in program.named_predictors()],
        ESTIMATE: {step: usage.as_dict() for step, usage in run.estimated.items()},
    }

    def describe(study: Study, trial: FrozenTrial) -> None:
        while described:
            study.set_user_attr(*described.popitem())

    return describe


def _finished(run: Run, programs: ProgramSpace, result: Any) -> Any:
    """The winner as a program, with the result of the search."""
    best = programs.build(result.best_params)
    best.search_result = result
    attach_statistics(best, programs, result, run.optimizer)
    scores = percent(result.best_score), percent(result.baseline_score)
    logger.info("Best program scores %.2f (baseline %.2f).", *scores)
    logger.info("The compile took %s.", result.usage.total)
    if (limit := result.stopped_by) is not None:
        over = f", exceeded by {result.overspent:,.6g}," if result.overspent else ""
        logger.warning("The search was ended by %s%s after %d program calls.", limit, over, result.calls)
    return best
