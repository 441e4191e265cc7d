"""MIPROv2: DSPy's optimizer with a concurrent, text-aware search step. DSPy in, DSPy out."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import dspy

# Where it is defined: others may put another class, ours among them, in place of `dspy.MIPROv2`.
from dspy.teleprompt.mipro_optimizer_v2 import MIPROv2 as StockMIPROv2
from optuna.samplers import BaseSampler

from mpromptune.engine.arguments import extending, split
from mpromptune.engine.options import SearchOptions, gather, resolve
from mpromptune.engine.schedule import Minibatches
from mpromptune.errors import SearchInterrupted, SearchStoppedError
from mpromptune.execution.interrupts import handled, interrupted
from mpromptune.execution.limits import Budget
from mpromptune.execution.pool import Score
from mpromptune.lms.errors import classify, retry_after
from mpromptune.lms.guard import Guard
from mpromptune.lms.prices import Pricing
from mpromptune.mipro.checks import check_arguments
from mpromptune.mipro.compatibility import incompatible, require_compatible
from mpromptune.mipro.configurations import ProgramScorer, ProgramSpace, wants_traceback
from mpromptune.mipro.estimate import Estimate
from mpromptune.mipro.evaluations import Evaluations
from mpromptune.mipro.fingerprint import fingerprint
from mpromptune.mipro.interception import interceptor
from mpromptune.mipro.records import attach_statistics, forget_statistics, percent, trial_logs
from mpromptune.mipro.remote import Elsewhere
from mpromptune.mipro.steps import Steps
from mpromptune.show.progress import together
from mpromptune.storage.storage import open_study

logger = logging.getLogger(__name__)

_STOCK_INIT = inspect.signature(StockMIPROv2.__init__)
_STOCK_COMPILE = inspect.signature(StockMIPROv2.compile)
# The options of the compile that is running in this context; None means DSPy's own search.
_OPTIONS: ContextVar[SearchOptions | None] = ContextVar("mpromptune_options", default=None)
# The steps of that compile before the search, when there are options.
_STEPS: ContextVar[Steps] = ContextVar("mpromptune_steps")


class _Zero(int):
    """A seed of 0 that survives DSPy's ``seed or self.seed``."""

    def __bool__(self) -> bool:
        return True


class _Planned(BaseException):
    """Ends a compile before its first LM call; no Exception, so that nothing takes it for a failure."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(str(estimate))
        self.estimate = estimate


class MIPROv2(StockMIPROv2):
    """A drop-in ``dspy.MIPROv2`` that can evaluate many prompt configurations at once.

    Without a sampler it is DSPy's optimizer, call for call. With one, the search step proposes
    batches of configurations, measures them concurrently on small blocks of the validation set,
    and returns the one with the highest posterior mean, measured on all of it next to the baseline.

    Args:
        *args: As ``dspy.MIPROv2``.
        sampler_config: Options of the search (see `mpromptune.engine.options.SearchOptions`), among them
            ``"sampler"``: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"`` or an Optuna sampler.
        **kwargs: As ``dspy.MIPROv2``; or single options, as in ``sampler_config``.

    Raises:
        UnknownOptionError: An option is not known (a TypeError).
        InvalidArgumentError: An option is out of range, or given twice (a ValueError).

    Example:
        >>> optimizer = MIPROv2(metric=metric, auto="light", num_threads=16)
        >>> best = optimizer.compile(program, trainset=trainset, sampler_config={"sampler": "qei"})
        >>> best.score, best.search_result.calls
    """

    @extending(_STOCK_INIT)
    def __init__(self, *args: Any, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        ours, stock = split(kwargs, _STOCK_INIT)
        if ours.get("verbose") is not None:
            ours["verbose"] = bool(ours["verbose"])  # DSPy takes anything
        self._defaults = gather(sampler_config, ours)
        resolve(self._defaults, {})  # fails now rather than after the bootstrap
        super().__init__(*args, **stock)

    @extending(_STOCK_COMPILE)
    def compile(self, student: Any, *, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Optimizes ``student``.

        Args:
            student: The program.
            sampler_config: Options of the search; they override the constructor's.
            **kwargs: Arguments of ``dspy.MIPROv2.compile`` (``trainset``, ``valset``, ...), or
                single options, as in ``sampler_config``.

        Returns:
            The best program, with ``score``, ``trial_logs``, ``candidate_programs`` and
            ``mb_candidate_programs`` as DSPy sets them, and ``search_result`` when a sampler is in
            use. With ``dry_run``, an `mpromptune.mipro.estimate.Estimate` instead.

        Raises:
            UnknownOptionError: An option is not known (a TypeError).
            InvalidArgumentError: An option or an argument cannot work (a ValueError).
            IncompatibleDSPyError: There are options, and DSPy has changed what they are built on.
            StudyInUseError: Another run is at work on the study.
            TravelError: Something cannot be sent to the workers of the executor (a TypeError).
            SearchStoppedError: No further call could succeed; what was measured is in ``.study``,
                and ``.program`` is the best so far.
            SearchInterrupted: By Ctrl-C or SIGTERM (a KeyboardInterrupt), with the same.
        """
        ours, stock = split(kwargs, _STOCK_COMPILE)
        options = resolve(self._defaults, {**gather(sampler_config, ours), **interceptor().options})
        if options is not None:
            require_compatible(self)
            check_arguments(self, student, stock)
            stock.update({"seed": _Zero()} if stock.get("seed") == 0 else {})
        interceptor().on_options(options)
        token = _OPTIONS.set(options)
        try:
            if options is None:
                return super().compile(student, **stock)
            with handled(), self._steps(student, options, stock):
                if options.dry_run:  # past what others hook into it: nothing is compiled
                    return inspect.unwrap(StockMIPROv2.compile)(self, student, **stock)
                return super().compile(student, **stock)
        except _Planned as planned:
            return planned.estimate
        finally:
            _OPTIONS.reset(token)

    @contextmanager
    def _steps(self, student: Any, options: SearchOptions, stock: Mapping[str, Any]) -> Iterator[None]:
        """Concurrent steps before the search, for as long as a compile takes."""
        defaults = {p.name: p.default for p in _STOCK_COMPILE.parameters.values()}
        pricing = Pricing(options.prices, must_know=options.max_cost is not None)
        guard = Guard(Budget(options.limits, grace=options.grace), pricing, pace=options.pace)
        steps = Steps(
            self,
            self._threads(options),
            {**defaults, **stock},
            guard,
            options.grace,
            options.retry,
            options.verbose,
        )
        token = _STEPS.set(steps)
        try:
            executor = None if options.dry_run else options.executor
            elsewhere = Elsewhere(executor, options.timeout, guard, self)
            with guard.budget.ending(), guard.watching(), steps.holding, elsewhere as steps.elsewhere:
                try:
                    yield
                finally:
                    guard.stopped.set()  # whatever is under way asks no LM any more
                    steps.close()
        except (SearchInterrupted, SearchStoppedError) as error:
            error.program = student if error.program is None else error.program
            error.usage = guard.budget.usage
            raise
        except KeyboardInterrupt as signalled:
            outside = interrupted(signalled)("The compile was interrupted outside its search.")
            outside.program, outside.usage = student, guard.budget.usage
            raise outside from signalled
        finally:
            _STEPS.reset(token)

    def _threads(self, options: SearchOptions) -> int:
        """Program calls at a time."""
        return int(self.num_threads or dspy.settings.num_threads) * options.n_jobs

    # Without options, whatever DSPy passes is handed on: its own search outlives changes of these methods.

    def _set_random_seeds(self, *args: Any, **kwargs: Any) -> None:
        if _OPTIONS.get() is None:
            super()._set_random_seeds(*args, **kwargs)
        else:
            self.rng = random.Random(*args, **kwargs)  # DSPy 3.2 seeds numpy's global generator as well
            _STEPS.get().seed = int(*args, **kwargs)

    def _set_hyperparams_from_run_mode(self, *args: Any, **kwargs: Any) -> Any:
        settings = super()._set_hyperparams_from_run_mode(*args, **kwargs)
        options = _OPTIONS.get()
        if options is not None:
            self._prepare(options, settings, *args, **kwargs)
        return settings

    def _prepare(self, options: SearchOptions, settings: Any, program: Any, *_: Any, **__: Any) -> None:
        """Checks what is known of the run, and looks up what an interrupted one has paid for."""
        if len(settings) != 5:
            raise incompatible(f"_set_hyperparams_from_run_mode returns {len(settings)} values, not 5")
        num_trials, valset, minibatch, *candidates = settings
        _STEPS.get().instructions_wanted = candidates[0]
        minibatches = _STEPS.get().minibatches(minibatch)
        options.check_run(len(valset), num_trials, minibatches)
        _STEPS.get().search_calls = options.search_calls(len(valset), num_trials, minibatches)
        if options.dry_run:
            return
        if options.storage is not None:
            run = fingerprint(self, program, valset, tuple(candidates), _STEPS.get().arguments)
            _STEPS.get().resume(open_study(options.storage, options.study_name), run)
        _check_embedder(options, program)
        _STEPS.get().elsewhere.check(program, valset)
        first = options.first_of_baseline(len(valset), _STEPS.get().seed, len(program.predictors()))
        _STEPS.get().score_ahead(valset, first)

    def _bootstrap_fewshot_examples(self, *args: Any, **kwargs: Any) -> Any:
        stock = super()._bootstrap_fewshot_examples
        options = _OPTIONS.get()
        if options is None:
            return stock(*args, **kwargs)
        estimate = partial(_STEPS.get().estimate, stock, *args, **kwargs)
        interceptor().on_estimate(estimate)
        if options.dry_run:
            raise _Planned(estimate())
        return _STEPS.get().demo_sets(stock, *args, **kwargs)

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        stock = super()._propose_instructions
        if _OPTIONS.get() is None:
            return stock(*args, **kwargs)
        return _STEPS.get().instructions(stock, *args, **kwargs)

    def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
        options = _OPTIONS.get()
        if options is None:
            return super()._optimize_prompt_parameters(*args, **kwargs)
        return self._optimized(options, *args, **kwargs)

    def _optimized(
        self,
        options: SearchOptions,
        program: Any,
        instruction_candidates: dict[int, list[str]],
        demo_candidates: Any,
        evaluate: Any,
        valset: list[Any],
        num_trials: int,
        minibatch: bool,
        minibatch_size: int,
        minibatch_full_eval_steps: int,
        seed: int,
    ) -> Any:
        minibatches = Minibatches(minibatch_size, minibatch_full_eval_steps, minibatch)
        max_calls = options.max_calls or minibatches.calls(num_trials, len(valset))
        _STEPS.get().close_threads()
        _STEPS.get().guard.spares = True  # from now on, the workers begin nothing beyond a limit
        forget_statistics(program)
        programs = ProgramSpace(program, instruction_candidates, demo_candidates)
        keep, show = _STEPS.get().predictions.keep, wants_traceback(evaluate.provide_traceback)
        run = _STEPS.get().elsewhere.runner(programs, valset)
        scorer = ProgramScorer(programs, valset, _STEPS.get().metric, show, keep, run)
        score = _STEPS.get().scored_ahead(programs, valset, scorer)
        try:
            result = self._search(programs, score, valset, options, max_calls, minibatches, int(seed))
        except (SearchInterrupted, SearchStoppedError) as error:
            error.program = program if error.result is None else self._finished(programs, error.result)
            raise
        return self._finished(programs, result)

    def _search(
        self,
        programs: ProgramSpace,
        score: Score,
        valset: list[Any],
        options: SearchOptions,
        max_calls: int,
        minibatches: Minibatches,
        seed: int,
    ) -> Any:
        # Torch is loaded here, once the bootstrap has shown that the program runs at all.
        from mpromptune.engine.search import search

        view = _STEPS.get().view
        view.bar("Searching", max_calls, "calls")
        evaluations = Evaluations(programs, valset, self.metric, _STEPS.get().predictions)
        return search(
            programs.prompt_space(),
            score,
            n_examples=len(valset),
            max_calls=max_calls,
            sampler=_sampler(options, seed),
            num_threads=self._threads(options),
            batch_size=options.batch_size,
            block_size=options.block_size,
            baseline=programs.baseline,
            seed=seed,
            storage=_STEPS.get().storage,
            study_name=options.study_name,
            callbacks=(evaluations.on_trial, *options.callbacks),
            confirm=options.confirm,
            patience=options.patience,
            target=options.target,
            schedule=options.schedule,
            minibatch=minibatches.enabled,
            minibatch_size=minibatches.size,
            minibatch_full_eval_steps=minibatches.full_eval_steps,
            executor=_STEPS.get().elsewhere.threads,
            classify=classify,
            retry=options.retry,
            retry_after=retry_after,
            grace=options.grace,
            failure_score=options.failure_score,
            on_progress=together(view.on_progress if options.verbose else None, options.on_progress),
            limits=_STEPS.get().guard.budget,
            stopped=_STEPS.get().guard.stopped,
        )

    def _finished(self, programs: ProgramSpace, result: Any) -> Any:
        """The winner as a program, with what the search found out."""
        best = programs.build(result.best_params)
        best.search_result = result
        if self.track_stats:
            attach_statistics(best, programs, result, self.log_dir)
        elif self.log_dir:
            trial_logs(result, programs.build, self.log_dir)
        scores = percent(result.best_score), percent(result.baseline_score)
        logger.info("Best program scores %.2f (baseline %.2f).", *scores)
        logger.info("The compile took %s.", result.usage.total)
        if (limit := result.stopped_by) is not None:
            message = "It ended by %s, exceeded by %g; %d program calls of the search were made."
            logger.warning(message, limit, result.overspent, result.calls)
        return best


def _sampler(options: SearchOptions, seed: int) -> BaseSampler | str:
    if isinstance(options.sampler, BaseSampler) or options.sampler.lower() != "qei":
        return options.sampler
    from mpromptune.sampling.sampler import qEISampler

    return qEISampler(**{"batch_size": None, **options.qei_arguments}, seed=seed)


def _check_embedder(options: SearchOptions, program: Any) -> None:
    """Embeds the student's instructions: an embedder that cannot work fails before any LM call."""
    if check := getattr(_sampler(options, 0), "check_embedder", None):
        check(list(dict.fromkeys(p.signature.instructions for p in program.predictors())))
