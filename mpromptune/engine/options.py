"""The options of a search, for `search`, for MIPROv2's constructor and for its compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from optuna.samplers import BaseSampler

from mpromptune.engine.batches import BatchPlan, Confirm
from mpromptune.engine.checks import CHECKS
from mpromptune.engine.minibatches import Minibatches, MiproPlan
from mpromptune.engine.plan import Plan, Task
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import InvalidArgumentError, UnknownOptionError, require_count, unknown
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.interrupts import GRACE
from mpromptune.execution.limits import Limits
from mpromptune.execution.pace import Pace
from mpromptune.execution.remote import check_executor
from mpromptune.sampling import SAMPLER_NAMES, unknown_sampler
from mpromptune.show.progress import OnProgress
from mpromptune.storage.storage import check_storage

# The plans by name, each made by `plan(task, table, batch_size=...)`; "blocks" also gets `_BLOCKS_ONLY`.
PLANS: Mapping[str, Callable[..., Plan]] = {"blocks": BatchPlan, "mipro": MiproPlan}

_BLOCKS_ONLY = ("block_size", "patience", "target", "confirm")
QEI_ONLY = ("max_space_size", "n_batches", "min_cold_start", "embedder", "device")
# Options of a compile whose candidates are also written while the search runs.
ADAPTIVE_ONLY = ("proposers", "reflection_lm", "instruction_proposer", "gains_file")
_DEFAULT_PROPOSALS = "fixed"
# Options that apply only to the steps before the search, or are explicit arguments of `search`.
_COMPILE_ONLY = (
    *("n_jobs", "max_calls", "prices", "dry_run", "verbose"),
    *("max_requests_per_minute", "max_tokens_per_minute"),
    *("proposals", *ADAPTIVE_ONLY),
)


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search.

    `search` takes them as keyword arguments, except ``n_jobs``, ``prices``, ``dry_run``, ``verbose``, the
    limits per minute and those on proposals, because its own ``proposers`` are objects; with
    ``schedule="mipro"`` it also takes DSPy's ``minibatch``, ``minibatch_size`` and
    ``minibatch_full_eval_steps``. ``MIPROv2`` takes all options.

    Attributes:
        sampler: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"`` (any case) or an Optuna sampler.
        n_jobs: Multiplies ``num_threads``, the number of program calls in flight.
        batch_size: Blocks (or trials) in a batch (q); by default derived from the budget, or the same as
            before in a study that is continued.
        max_space_size: (qei) Spaces of up to this size are enumerated at every proposal.
        n_batches: (qei) Number of random joint batches that compete with the greedy one.
        min_cold_start: (qei) Number of finished trials before the first model.
        embedder: (qei) Model name or path, SentenceTransformer, dspy.Embedder or callable.
        device: (qei) Device on which the surrogate is fitted and evaluated; by default the CPU.
        block_size: Examples in a block; by default 5, or 3 if configurations combine several predictors.
        max_calls: Program calls to spend; by default exactly as many as DSPy's MIPROv2.
        confirm: ``"auto"`` measures the winner on every example in the end if that takes at most a fifth of
            the calls, and the baseline until it is 95 % certain which of the two is better. True keeps
            calls back so that both are measured on every example. False keeps no calls back.
        patience: Stop after this number of consecutive batches without an expected gain: no open
            configuration's expected gain over the leader is a tenth of a full evaluation's standard error.
            None: never stop. It has no effect while all scores are equal.
        target: Stop exploring when the leader's posterior mean reaches this mean score; continue if its
            score is lower when it is fully measured.
        schedule: ``"blocks"``; ``"mipro"`` for DSPy's minibatches and full evaluations; `Minibatches` with
            other sizes; or a callable that makes a `Plan`.
        proposals: ``"fixed"``: all candidates are written before the search. ``"adaptive"``: others are
            written while it runs, from what it has found; for ``"qei"`` and ``schedule="blocks"`` only.
        proposers: (adaptive) What writes them: names (`mpromptune.operators.registry.OPERATORS`) or objects
            (`mpromptune.engine.proposers.Proposer`); by default all operators.
        reflection_lm: (adaptive) The language model that rewrites instructions, as in ``dspy.GEPA``; by
            default the prompt model.
        instruction_proposer: (adaptive) A ``ProposalFn`` as in ``dspy.GEPA``, for the operator ``"reflect"``.
        gains_file: (adaptive) Path of a file with what earlier compiles have learned about proposers; it is
            read at the beginning and updated at the end. By default nothing is learned across compiles.
        max_tokens: Tokens that the whole compile may use, prompts and completions together.
        max_cost: US dollars that the whole compile may cost.
        max_seconds: Wall-clock time that the whole compile may take, not counting ``grace``.
        prices: Maps a model to US dollars per million prompt and completion tokens, or is a callable
            ``(model, usage) -> dollars``; by default the cost that the provider reports or LiteLLM lists.
        max_requests_per_minute: Most LM requests in any minute.
        max_tokens_per_minute: Most tokens in any minute.
        dry_run: Return an `Estimate` of the usage of the compile without calling an LM.
        failure_score: The score of an example on which the candidate itself fails.
        timeout: Seconds after which an attempt of a program call is cancelled (default: never). It also
            holds for a proposal during the search, by default with 300.
        max_retries: Number of retries after infrastructure errors; retries after rate limits do not count.
        grace: Seconds that calls in flight may still take after Ctrl-C, SIGTERM or ``max_seconds``. No
            other call begins; a second Ctrl-C stops the waiting.
        storage: Path of a journal file, URL of a database, or an Optuna storage; the same call then
            continues an interrupted search. By default the study is in memory.
        study_name: Name of the study in the storage, by default ``"mpromptune"``.
        callbacks: Called as ``callback(study, trial)`` after every finished trial, in the order in which
            trials are told.
        on_progress: Called as ``on_progress(progress)`` with a `Progress`: at the beginning, after every
            batch, about twice a second while calls are awaited, and at the end. It runs in the thread of the
            search, so it should be fast; if it raises an error, this is logged and it is not called again.
        verbose: Show the progress of the compile.
        executor: Computes the scores; by default threads. A ``concurrent.futures.Executor``, which is left
            open, or a callable that makes one, which is called again when the executor breaks. Unless it is
            a ``ThreadPoolExecutor``, the score is sent to it by cloudpickle; context variables are not. It
            should run ``num_threads`` calls at once, because ``timeout`` includes the time in its queue.

    Raises:
        InvalidArgumentError: A value is not valid.
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
    schedule: str | Minibatches | Callable[..., Plan] = "blocks"
    proposals: str | None = None
    proposers: Sequence[Any] | None = None
    reflection_lm: Any = None
    instruction_proposer: Any = None
    gains_file: Any = None
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
        for name, check in CHECKS.items():
            if getattr(self, name) is not None:
                check(name, getattr(self, name))
        _ = self.limits  # checks them
        self._check_sampler()
        self._check_schedule()
        self._check_adaptive()
        check_executor(self.executor)
        check_storage(self.storage, self.study_name)

    @classmethod
    def of_search(cls, given: Mapping[str, Any], valid: Sequence[str]) -> SearchOptions:
        """The options given to `search`, DSPy's minibatch arguments included; None means the default.

        Raises:
            UnknownOptionError: A name is not an option of `search`, whose arguments are ``valid``.
        """
        for name in given:
            if name in OPTION_NAMES and name not in SEARCH_OPTIONS:
                raise UnknownOptionError(f"{name!r} is an option of MIPROv2, not of search: leave it out.")
            if name not in SEARCH_OPTIONS:
                raise UnknownOptionError(unknown("option", name, valid, "help(mpromptune.search)"))
        chosen = {name: value for name, value in given.items() if value is not None}
        sizes = {field.name: chosen.pop(field.name) for field in fields(Minibatches) if field.name in chosen}
        if chosen.get("schedule") == "mipro":
            chosen["schedule"] = Minibatches(**sizes)
        return cls(**chosen)

    @property
    def of_compile(self) -> dict[str, Any]:
        """The options that a compile passes to `search`."""
        return {name: getattr(self, name) for name in OPTION_NAMES if name not in _COMPILE_ONLY}

    @property
    def limits(self) -> Limits:
        """The limits on the usage of the whole compile."""
        return Limits(self.max_tokens, self.max_cost, self.max_seconds)

    @property
    def pace(self) -> Pace | None:
        """The limits per minute; None if there are none."""
        caps = self.max_requests_per_minute, self.max_tokens_per_minute
        return None if caps == (None, None) else Pace(*caps)

    @property
    def retry(self) -> RetryPolicy:
        """The number of attempts of a program call and their timeout."""
        return RetryPolicy(attempts=1 + self.max_retries, timeout=self.timeout)

    def made_sampler(self, seed: int) -> BaseSampler | str:
        """The sampler: a `qEISampler` with its options for ``"qei"``, otherwise the sampler or name given."""
        if isinstance(self.sampler, BaseSampler) or self.sampler.lower() != "qei":
            return self.sampler
        from mpromptune.sampling.sampler import qEISampler  # it loads torch

        given = {name: getattr(self, name) for name in (*QEI_ONLY, "batch_size")}
        given = {name: value for name, value in given.items() if value is not None or name == "batch_size"}
        return qEISampler(**given, seed=seed)

    @property
    def is_adaptive(self) -> bool:
        """Whether candidates are also written while the search runs."""
        if self.proposals is None:
            return _DEFAULT_PROPOSALS == "adaptive" and self.can_adapt
        return self.proposals == "adaptive"

    @property
    def can_adapt(self) -> bool:
        """Whether the search chooses configurations by its own model, which knows what is not written yet."""
        if self.schedule != "blocks" or isinstance(self.sampler, str):
            return self.schedule == "blocks" and str(self.sampler).lower() == "qei"
        from mpromptune.sampling.samplers import is_qei  # it loads torch

        return is_qei(self.sampler)

    @property
    def schedule_name(self) -> str:
        """The name of the plan in a study's settings."""
        return self._planner[0]

    @property
    def _planner(self) -> tuple[str, Callable[..., Plan]]:
        """The name of the plan, and what makes it."""
        if isinstance(self.schedule, Minibatches):
            return "mipro", partial(MiproPlan, minibatches=self.schedule)
        if isinstance(self.schedule, str):
            return self.schedule, PLANS[self.schedule]
        return getattr(self.schedule, "__name__", type(self.schedule).__name__), self.schedule

    def plan(self, task: Task, table: ScoreTable, batch_size: int | None = None) -> Plan:
        """The plan for these options.

        Args:
            task: The search problem.
            table: The scores that the plan decides by.
            batch_size: The batch size recorded in the study; the option of that name takes precedence.

        Raises:
            InvalidArgumentError: The plan does not work with this budget and this number of examples.
        """
        own = _BLOCKS_ONLY if self.schedule == "blocks" else ()
        given = {name: getattr(self, name) for name in own}
        return self._planner[1](task, table, batch_size=self.batch_size or batch_size, **given)

    def within(self, n_examples: int, num_trials: int, minibatches: Minibatches) -> SearchOptions:
        """The options with DSPy's minibatches and, unless ``max_calls`` is given, the budget of DSPy's plan.

        Raises:
            InvalidArgumentError: DSPy's arguments are not valid.
        """
        calls = self.max_calls
        if calls is None:
            calls = minibatches.within(n_examples).calls(require_count("num_trials", num_trials), n_examples)
        return replace(
            self, max_calls=calls, schedule=minibatches if self.schedule == "mipro" else self.schedule
        )

    def _check_sampler(self) -> None:
        if isinstance(self.sampler, BaseSampler):
            name = type(self.sampler).__name__
        elif isinstance(self.sampler, str) and self.sampler.lower() in SAMPLER_NAMES:
            name = self.sampler.lower()
        else:
            raise unknown_sampler(self.sampler)
        given = [key for key in QEI_ONLY if getattr(self, key) is not None]
        if given and name != "qei":
            raise InvalidArgumentError(
                f"{given} only apply to sampler='qei'; got sampler {name!r}. Set them on the sampler itself."
            )

    def _check_schedule(self) -> None:
        if not isinstance(self.confirm, bool) and self.confirm != "auto":
            raise InvalidArgumentError(f"confirm must be True, False or 'auto'; got {self.confirm!r}.")
        known = self.schedule in PLANS if isinstance(self.schedule, str) else callable(self.schedule)
        if not (known or isinstance(self.schedule, Minibatches)):
            raise InvalidArgumentError(f"schedule must be one of {list(PLANS)}; got {self.schedule!r}.")
        foreign = {name: getattr(self, name) for name in _BLOCKS_ONLY}
        if self.confirm is not False:  # every other plan confirms in its own way
            del foreign["confirm"]
        foreign = {name: value for name, value in foreign.items() if value is not None}
        if self.schedule != "blocks" and foreign:
            raise InvalidArgumentError(
                f"{foreign} only apply to schedule='blocks'; got schedule={self.schedule!r}."
            )

    def _check_adaptive(self) -> None:
        if self.is_adaptive and not self.can_adapt:
            raise InvalidArgumentError(
                "proposals='adaptive' works only with sampler='qei' and schedule='blocks'; got sampler="
                f"{self.sampler!r} and schedule={self.schedule!r}."
            )
        given = [name for name in ADAPTIVE_ONLY if getattr(self, name) is not None]
        if given and not self.is_adaptive:
            raise InvalidArgumentError(
                f"{given} only apply to proposals='adaptive', which was not given. Pass it, or omit them."
            )


OPTION_NAMES = tuple(field.name for field in fields(SearchOptions))
# The options of `search` with their defaults.
SEARCH_OPTIONS: dict[str, Any] = {
    **{field.name: field.default for field in fields(SearchOptions) if field.name not in _COMPILE_ONLY},
    **{field.name: field.default for field in fields(Minibatches)},
}
