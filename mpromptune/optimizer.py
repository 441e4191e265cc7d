"""MIPROv2: DSPy's optimizer with a concurrent, text-aware search step. DSPy in, DSPy out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import dspy
from optuna.samplers import BaseSampler

from mpromptune import bootstrap
from mpromptune.lm_errors import classify
from mpromptune.options import OPTION_NAMES, SearchOptions, gather, resolve, unknown_option
from mpromptune.programs import ProgramScorer, ProgramSpace
from mpromptune.progress import progress_bar
from mpromptune.records import attach_statistics

logger = logging.getLogger(__name__)

_STOCK_OPTIONS = tuple(inspect.signature(dspy.MIPROv2.compile).parameters)
# The options of the compile that is running in this context; None means DSPy's own search.
_OPTIONS: ContextVar[SearchOptions | None] = ContextVar("mpromptune_options", default=None)


class _Zero(int):
    """A seed of 0 that survives DSPy's ``seed or self.seed``."""

    def __bool__(self) -> bool:
        return True


class MIPROv2(dspy.MIPROv2):
    """A drop-in ``dspy.MIPROv2`` that can evaluate many prompt configurations at once.

    Without a sampler it is DSPy's optimizer, call for call. With one, the search step proposes
    batches of configurations, measures them concurrently on shared blocks of the validation set,
    and returns the one with the highest posterior mean, measured on all of it next to the baseline.

    Args:
        *args: As ``dspy.MIPROv2``.
        sampler_config: Options of the search (see `mpromptune.options.SearchOptions`), among them
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

    def __init__(
        self, *args: Any, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        ours, stock = _split(kwargs, tuple(inspect.signature(dspy.MIPROv2.__init__).parameters))
        self._defaults = gather(sampler_config, ours)
        resolve(self._defaults, {})  # fails now rather than after the bootstrap
        super().__init__(*args, **stock)

    def compile(
        self, student: Any, *, sampler_config: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Optimizes ``student``.

        Args:
            student: The program.
            sampler_config: Options of the search; they override the constructor's.
            **kwargs: Arguments of ``dspy.MIPROv2.compile`` (``trainset``, ``valset``, ...), or
                single options, as in ``sampler_config``.

        Returns:
            The best program, with ``score``, ``trial_logs``, ``candidate_programs`` and
            ``mb_candidate_programs`` as DSPy sets them, and ``search_result`` when a sampler is in
            use.

        Raises:
            UnknownOptionError: An option is not known (a TypeError).
            InvalidArgumentError: An option is out of range, or given twice (a ValueError).
            SearchStoppedError: No further call could succeed; what was measured is in ``.study``.
        """
        ours, stock = _split(kwargs, _STOCK_OPTIONS)
        options = resolve(self._defaults, gather(sampler_config, ours))
        if options is not None and stock.get("seed") == 0:
            stock["seed"] = _Zero()
        token = _OPTIONS.set(options)
        try:
            return super().compile(student, **stock)
        finally:
            _OPTIONS.reset(token)

    def _bootstrap_fewshot_examples(self, program: Any, trainset: list[Any], *args: Any, **kwargs: Any) -> Any:
        labelled_only = kwargs.get("max_bootstrapped_demos") == 0 and kwargs.get("max_labeled_demos", 0) > 0
        if _OPTIONS.get() is None or not labelled_only:
            return super()._bootstrap_fewshot_examples(program, trainset, *args, **kwargs)
        return bootstrap.labelled_demo_sets(
            program, trainset, kwargs["num_fewshot_candidates"], kwargs["max_labeled_demos"], self.rng
        )

    def _optimize_prompt_parameters(
        self,
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
        options = _OPTIONS.get()
        if options is None:
            return super()._optimize_prompt_parameters(
                program,
                instruction_candidates,
                demo_candidates,
                evaluate,
                valset,
                num_trials,
                minibatch,
                minibatch_size,
                minibatch_full_eval_steps,
                seed,
            )
        # Torch is loaded here, once the bootstrap has shown that the program runs at all.
        from mpromptune.schedule import stock_calls

        stock = stock_calls(num_trials, len(valset), minibatch, minibatch_size, minibatch_full_eval_steps)
        programs = ProgramSpace(program, instruction_candidates, demo_candidates)
        return self._search(programs, valset, options, options.max_calls or stock, int(seed))

    def _search(
        self,
        programs: ProgramSpace,
        valset: list[Any],
        options: SearchOptions,
        max_calls: int,
        seed: int,
    ) -> Any:
        from mpromptune.engine import search

        threads = (self.num_threads or dspy.settings.num_threads) * options.n_jobs
        with progress_bar("Searching", max_calls) as bar:
            result = search(
                programs.prompt_space(),
                ProgramScorer(programs, valset, self.metric),
                n_examples=len(valset),
                max_calls=max_calls,
                sampler=_sampler(options, seed),
                num_threads=threads,
                batch_size=options.batch_size,
                block_size=options.block_size,
                baseline=programs.baseline,
                seed=seed,
                storage=options.storage,
                study_name=options.study_name,
                callbacks=(bar.on_trial, *options.callbacks),
                confirm=options.confirm,
                classify=classify,
                failure_score=options.failure_score,
                on_call=bar.on_call,
            )
        best = programs.build(result.best_params)
        best.search_result = result
        if self.track_stats:
            attach_statistics(best, programs, result, self.log_dir)
        logger.info("Best program scores %.2f (baseline %.2f).", best_percent(result), 100 * result.baseline_score)
        return best


def best_percent(result: Any) -> float:
    """The winner's score as DSPy prints it, in percent."""
    return round(100 * result.best_score, 2)


def _sampler(options: SearchOptions, seed: int) -> BaseSampler | str:
    if isinstance(options.sampler, BaseSampler) or options.sampler.lower() != "qei":
        return options.sampler
    from mpromptune.sampler import qEISampler

    return qEISampler(**options.qei_arguments, seed=seed)


def _split(kwargs: Mapping[str, Any], stock: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and DSPy's arguments; anything else is an error that lists both."""
    for name in kwargs:
        if name not in OPTION_NAMES and name not in stock:
            raise unknown_option(name, [n for n in stock if n not in ("self", "student")])
    ours = {k: v for k, v in kwargs.items() if k in OPTION_NAMES}
    return ours, {k: v for k, v in kwargs.items() if k not in OPTION_NAMES}
