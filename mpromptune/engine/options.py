"""The options that MIPROv2 takes beside DSPy's own: names, defaults, and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler

from mpromptune.engine.schedule import (
    SCHEDULE_NAMES,
    Confirm,
    Minibatches,
    check_block_size,
    check_budget,
    default_block_size,
    first_keys,
)
from mpromptune.errors import InvalidArgumentError, UnknownOptionError, require_count, require_finite
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.interrupts import GRACE
from mpromptune.execution.limits import Limits
from mpromptune.execution.pace import Pace
from mpromptune.execution.remote import check_executor
from mpromptune.sampling import SAMPLER_NAMES, unknown_sampler
from mpromptune.show.progress import OnProgress
from mpromptune.storage.storage import check_storage

_QEI_ONLY = ("max_space_size", "n_batches", "min_cold_start", "embedder", "device")
_COUNTS = (
    "n_jobs",
    "batch_size",
    "max_space_size",
    "n_batches",
    "min_cold_start",
    "block_size",
    "max_calls",
    "patience",
    "max_requests_per_minute",
    "max_tokens_per_minute",
)


@dataclass(frozen=True)
class SearchOptions:
    """How the search step of `MIPROv2.compile` is run.

    Attributes:
        sampler: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"`` (any case) or an Optuna sampler.
        n_jobs: Multiplies ``num_threads``: so many times as many program calls in flight.
        batch_size: Configurations per round; by default 4, or enough to occupy all threads if the budget has
            many such rounds.
        max_space_size: (qei) Spaces of up to this size are enumerated at every proposal.
        n_batches: (qei) Random joint batches that compete with the greedy one.
        min_cold_start: (qei) Finished trials before the first model.
        embedder: (qei) Model name or path, SentenceTransformer, dspy.Embedder or callable.
        device: (qei) Where the surrogate is fitted and asked; by default the CPU.
        block_size: Validation examples of a place in a batch (default 5).
        max_calls: Program calls to spend; by default exactly what DSPy's MIPROv2 would.
        confirm: ``True`` keeps calls back so that winner and baseline end fully measured; ``"auto"`` as far
            as that costs little; ``False`` compares by the posterior alone.
        patience: Stop after so many rounds in a row without a gain in sight (default: never).
        target: Stop once a mean score of the metric is reached and confirmed (default: none).
        schedule: ``"blocks"``, or ``"mipro"`` for minibatches and full evaluations as DSPy's.
        max_tokens: Tokens that the whole compile may use, in both directions.
        max_cost: US dollars that it may cost.
        max_seconds: Wall-clock time that it may take, but for ``grace``.
        prices: Model to US dollars per million prompt and completion tokens, or a callable
            ``(model, usage) -> dollars``; by default what the provider reports or LiteLLM lists.
        max_requests_per_minute: LM requests in any minute.
        max_tokens_per_minute: Tokens in any minute.
        dry_run: Return an `Estimate` of what the compile would use, and ask no LM.
        failure_score: What an example scores when the candidate itself fails on it.
        timeout: Seconds after which an attempt of a program call is given up (default: never).
        max_retries: Further attempts after errors of the infrastructure, rate limits apart.
        grace: Seconds that Ctrl-C, SIGTERM and ``max_seconds`` leave to calls in flight.
        storage: Path of a journal file, URL of a database, or an Optuna storage, in which the same
            call goes on where it was interrupted; by default memory.
        study_name: Name of the study in the storage.
        callbacks: Called as ``callback(study, trial)`` after every trial.
        on_progress: Called as ``on_progress(progress)`` with an `mpromptune.show.progress.Progress` after
            every round of the search, and in between.
        verbose: Show how the compile is getting on.
        executor: Where the programs of the search are run: a ``concurrent.futures.Executor``, or a
            callable that makes one (default: threads).
    """

    sampler: BaseSampler | str = "qei"
    n_jobs: int = 1
    batch_size: int | None = None
    max_space_size: int | None = None
    n_batches: int | None = None
    min_cold_start: int | None = None
    embedder: Any = None
    device: Any = None
    block_size: int | None = None
    max_calls: int | None = None
    confirm: Confirm = "auto"
    patience: int | None = None
    target: float | None = None
    schedule: str = "blocks"
    max_tokens: int | None = None
    max_cost: float | None = None
    max_seconds: float | None = None
    prices: Any = None
    max_requests_per_minute: int | None = None
    max_tokens_per_minute: int | None = None
    dry_run: bool = False
    failure_score: float = 0.0
    timeout: float | None = None
    max_retries: int = 5
    grace: float = GRACE
    storage: Any = None
    study_name: str | None = None
    callbacks: Sequence[Any] = ()
    on_progress: OnProgress | None = None
    verbose: bool = True
    executor: Any = None

    def __post_init__(self) -> None:
        self._check_sampler()
        for name in _COUNTS:
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), least=0 if name == "n_batches" else 1)
        self._check_embedder()
        self._check_device()
        self._check_callbacks()
        check_executor(self.executor)
        _ = self.limits  # checks them
        for name in ("dry_run", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        _check_prices(self.prices)
        require_finite("failure_score", self.failure_score)
        self._check_waits()
        if self.target is not None:
            require_finite("target", self.target)
        check_schedule(self.schedule, self.block_size, self.confirm, self.patience, self.target)
        check_storage(self.storage, self.study_name)

    @property
    def limits(self) -> Limits:
        """On what the whole compile may use."""
        return Limits(self.max_tokens, self.max_cost, self.max_seconds)

    @property
    def pace(self) -> Pace | None:
        """Caps per minute, if any are given."""
        caps = self.max_requests_per_minute, self.max_tokens_per_minute
        return None if caps == (None, None) else Pace(*caps)

    def _check_sampler(self) -> None:
        if isinstance(self.sampler, BaseSampler):
            name = type(self.sampler).__name__
        elif isinstance(self.sampler, str) and self.sampler.lower() in SAMPLER_NAMES:
            name = self.sampler.lower()
        else:
            raise unknown_sampler(self.sampler)
        given = [key for key in _QEI_ONLY if getattr(self, key) is not None]
        if given and name != "qei":
            raise InvalidArgumentError(
                f"{given} only apply to sampler='qei'; got sampler {name!r}. Set them on the sampler itself."
            )

    def _check_embedder(self) -> None:
        embedder = self.embedder
        known = embedder is None or isinstance(embedder, str) or callable(embedder)
        if not known and not hasattr(embedder, "encode"):
            raise InvalidArgumentError(
                "embedder must be a model name or path, a SentenceTransformer, a dspy.Embedder or a "
                f"callable; got {embedder!r}."
            )

    def _check_device(self) -> None:
        if self.device is not None:
            from mpromptune.model.devices import resolve_device  # it loads torch

            resolve_device(self.device)

    def _check_waits(self) -> None:
        require_count("max_retries", self.max_retries, least=0)
        if require_finite("grace", self.grace) < 0:
            raise InvalidArgumentError(f"grace must not be negative; got {self.grace!r}.")
        if self.timeout is not None and require_finite("timeout", self.timeout) <= 0:
            raise InvalidArgumentError(f"timeout must be above 0; got {self.timeout!r}.")

    def _check_callbacks(self) -> None:
        is_list = isinstance(self.callbacks, Sequence)
        if not is_list or not all(callable(callback) for callback in self.callbacks):
            raise InvalidArgumentError(f"callbacks must be a list of callables; got {self.callbacks!r}.")
        if self.on_progress is not None and not callable(self.on_progress):
            raise InvalidArgumentError(f"on_progress must be a callable; got {self.on_progress!r}.")

    def check_run(self, n_examples: int, num_trials: int, minibatches: Minibatches) -> None:
        """Whether a search can be run at all; called before anything is paid for.

        Args:
            n_examples: Size of the validation set.
            num_trials: DSPy's, from which the budget follows unless ``max_calls`` is given.
            minibatches: DSPy's too.

        Raises:
            InvalidArgumentError: It cannot.
        """
        if self.block_size is not None:
            check_block_size(self.block_size, n_examples)
        if self.max_calls is None:
            require_count("num_trials", num_trials)
            minibatches.within(n_examples)
        elif self.schedule == "mipro":
            minibatches.within(n_examples).trials_for(self.max_calls, n_examples)
        else:
            check_budget(self.max_calls, n_examples, self.confirm)

    def first_of_baseline(self, n_examples: int, seed: int, n_predictors: int) -> list[int]:
        """The examples that the search measures the baseline on first of all; all where it confirms.

        Args:
            n_examples: Size of the validation set.
            seed: Of the search.
            n_predictors: Of the program.
        """
        order: list[int] = np.argsort(first_keys(n_examples, seed), kind="stable").tolist()
        size = self.block_size or default_block_size(n_examples, is_combined=n_predictors > 1)
        first = order if self.schedule == "mipro" or self.confirm is True else order[:size]
        return first[: self.max_calls]

    def search_calls(self, n_examples: int, num_trials: int, minibatches: Minibatches) -> int:
        """Program calls of the search, at most; arguments as in `check_run`, which has been passed."""
        if self.max_calls is None:
            return minibatches.calls(num_trials, n_examples)
        if self.schedule == "blocks":
            return self.max_calls
        batches = minibatches.within(n_examples)
        return batches.calls(batches.trials_for(self.max_calls, n_examples), n_examples)

    @property
    def retry(self) -> RetryPolicy:
        """How a program call is tried."""
        return RetryPolicy(attempts=1 + self.max_retries, timeout=self.timeout)

    @property
    def qei_arguments(self) -> dict[str, Any]:
        """What was given of qEISampler's arguments."""
        names = (*_QEI_ONLY, "batch_size")
        return {key: value for key in names if (value := getattr(self, key)) is not None}


def check_schedule(
    schedule: str, block_size: int | None, confirm: Confirm, patience: int | None, target: float | None
) -> None:
    """Refuses what no schedule knows, and options that mean nothing to the one named.

    Raises:
        InvalidArgumentError: Which of them, or what ``confirm`` may be.
    """
    if not isinstance(confirm, bool) and confirm != "auto":
        raise InvalidArgumentError(f"confirm must be True, False or 'auto'; got {confirm!r}.")
    if schedule not in SCHEDULE_NAMES:
        raise InvalidArgumentError(f"schedule must be one of {list(SCHEDULE_NAMES)}; got {schedule!r}.")
    given = {"block_size": block_size, "patience": patience, "target": target}
    foreign = {name: value for name, value in given.items() if value is not None}
    if confirm is not True and confirm != "auto":
        foreign["confirm"] = confirm
    if schedule != "blocks" and foreign:
        raise InvalidArgumentError(f"{foreign} only apply to schedule='blocks'; got schedule={schedule!r}.")


def _check_prices(prices: Any) -> None:
    """Refuses what is no table of prices.

    Raises:
        InvalidArgumentError: It is neither a mapping to two prices each nor a callable.
    """
    if prices is None or callable(prices):
        return
    rows = prices.values() if isinstance(prices, Mapping) else [None]
    if not all(_is_price(row) for row in rows):
        raise InvalidArgumentError(
            "prices must map each model to (US dollars per million prompt tokens, completion tokens), or "
            f"be a callable of model and usage; got {prices!r}."
        )


def _is_price(row: Any) -> bool:
    is_pair = isinstance(row, tuple | list) and len(row) == 2
    return is_pair and all(isinstance(x, Real) and 0.0 <= float(x) < math.inf for x in row)


OPTION_NAMES = tuple(field.name for field in fields(SearchOptions))


def gather(*sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merges options given in several places of one call; None means not given.

    Raises:
        InvalidArgumentError: The same option is given twice, or a source is not a mapping.
        UnknownOptionError: A name is not an option.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        if source is not None and not isinstance(source, Mapping):
            raise InvalidArgumentError(f"sampler_config must be a dict of options; got {source!r}.")
        for key, value in (source or {}).items():
            if key not in OPTION_NAMES:
                raise unknown_option(key)
            if value is None:
                continue
            if key in merged:
                raise InvalidArgumentError(f"{key!r} is given twice: {merged[key]!r} and {value!r}.")
            merged[key] = value
    return merged


def resolve(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SearchOptions | None:
    """The options in force; None when nothing asks for a sampler, which means DSPy's own search.

    ``n_jobs`` and ``verbose`` alone ask for nothing: the one has no meaning for DSPy's serial loop, the
    other is also an argument of DSPy's own. A sampler given now takes no arguments that were meant for
    the default one.
    """
    sampler = given.get("sampler", "qei")
    if not isinstance(sampler, str) or sampler.lower() != "qei":
        defaults = {key: value for key, value in defaults.items() if key not in _QEI_ONLY}
    merged = {**defaults, **given}
    options = SearchOptions(**merged)
    silent = {"n_jobs", "verbose"} if options.dry_run else {"n_jobs", "verbose", "dry_run"}
    return options if set(merged) - silent else None


def unknown_option(name: str, others: Sequence[str] = ()) -> UnknownOptionError:
    """The error for a name that is neither ours nor DSPy's."""
    valid = sorted({*OPTION_NAMES, *others})
    return UnknownOptionError(f"Unknown option {name!r}. Valid options are: {', '.join(valid)}.")
