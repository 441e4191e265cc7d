"""`search`: the engine without DSPy."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mpromptune.engine.arguments import with_options
from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Growth, capacity_of
from mpromptune.engine.loop import Loop
from mpromptune.engine.options import SearchOptions
from mpromptune.engine.plan import Plan, Task
from mpromptune.engine.proposers import Candidates, Proposer, Texts, check_proposers, gain_of
from mpromptune.engine.result import SearchResult
from mpromptune.engine.scores import ScoreTable
from mpromptune.engine.settings import recorded_settings, require_same, settings_of, write_settings
from mpromptune.engine.trials import Trials, table_of
from mpromptune.engine.writing import THREADS, Writing, threads
from mpromptune.errors import CallTimeoutError, InvalidArgumentError, require_count
from mpromptune.execution.attempts import (
    INFRASTRUCTURE,
    Attempts,
    Classify,
    RetryAfter,
    RetryPolicy,
    Verdict,
    no_hint,
)
from mpromptune.execution.interrupts import handled
from mpromptune.execution.limits import PROPOSE, SEARCH, Budget
from mpromptune.execution.pool import Score, Workers, classify_builtin
from mpromptune.execution.remote import Workplace, measuring
from mpromptune.execution.usage import Meter, Usage, metered
from mpromptune.model.space import Gain, PromptSpace
from mpromptune.sampling.encoding import distributions_of
from mpromptune.sampling.sampler import qEISampler
from mpromptune.sampling.samplers import bind, is_qei, resolve_sampler
from mpromptune.storage.damage import named, readable, require_readable
from mpromptune.storage.lease import Lease, held
from mpromptune.storage.record import Record, check_left, read_record
from mpromptune.storage.storage import open_study

logger = logging.getLogger(__name__)

# NOTE: attempts of a request for a proposal; the search waits for it, and goes on without it.
_REQUESTS = RetryPolicy(attempts=3, give_up_after=60.0)


@with_options
def search(
    space: PromptSpace,
    score: Score,
    *,
    n_examples: int,
    max_calls: int,
    num_threads: int = 8,
    baseline: Mapping[str, int] | None = None,
    seed: int = 0,
    classify: Classify = classify_builtin,
    retry: RetryPolicy | None = None,
    retry_after: RetryAfter = no_hint,
    budget: Budget | None = None,
    stopped: threading.Event | None = None,
    proposers: Sequence[Proposer] = (),
    candidates: Candidates | None = None,
    **options: Any,
) -> SearchResult:
    """Find the configuration with the highest mean score within a budget of program calls.

    The search measures batches of ``batch_size`` blocks, several batches at a time. A block is one
    configuration on ``block_size`` examples; a configuration may have several blocks in a batch. With
    ``"qei"``, configurations are chosen by their chance to be the best when all calls are spent, and examples
    mostly by how well they distinguish the leaders (see docs/mathematics.md); no pair of configuration and
    example is paid for twice. With ``schedule="mipro"``, trials use random minibatches, and at intervals the
    best configuration so far is evaluated on all examples, as in DSPy's MIPROv2. Proposals depend on
    ``seed``, ``batch_size``, the number of batches in flight (the same for up to 32 threads) and the scores
    of earlier batches, never on timing.

    With ``storage``, every score is saved at once, and the same call continues a search that ended early for
    any reason. After ``kill -9``, the trials of ``"qei"`` are those of an uninterrupted search; trials cut
    short by an error or an interrupt continue under new numbers. No saved score is paid for again, and a
    finished search returns its result without a call. ``max_calls`` counts the calls of all runs. It may
    change between runs, as may ``confirm``, ``patience``, ``target``, ``failure_score``, ``num_threads``, the
    sampler and the callbacks; callbacks are not called again for old trials. Only one run at a time may use a
    study. After ``kill -9`` the study is free at once on the same host; on other hosts after a minute, for
    which the next run waits.

    Args:
        space: The configurations.
        score: ``score(params, example) -> float``, higher is better; called from threads. If there are
            limits on usage, it reports its usage by `mpromptune.execution.usage.record`. It may return a
            `Noted` number: the note is saved with the score.
        n_examples: Size of the validation set; examples are ``0 .. n_examples - 1``.
        max_calls: Calls of ``score`` to spend; fewer are spent if nothing is left to measure.
        num_threads: Calls made at the same time.
        baseline: Configuration to compare with; by default the first of the space.
        seed: Determines blocks and proposals, and so the whole search.
        classify: Returns the verdict on an exception of ``score``.
        retry: How infrastructure errors are retried; by default from ``timeout`` and ``max_retries``.
        retry_after: Returns the seconds that an exception of ``score`` asks to wait, or None.
        budget: A running budget, used instead of ``max_tokens``, ``max_cost`` and ``max_seconds``.
        stopped: When it is set, no further call begins; the search sets it when nothing more may be spent.
        proposers: Write new candidates while the search runs, for a product of components, with ``"qei"``,
            ``schedule="blocks"`` and threads only. A proposal counts as ``calls`` of ``max_calls``. It fails
            after ``timeout`` seconds, by default five minutes.
        candidates: Makes what the proposers write known to ``score``; by default nothing is done.
        options: See `SearchOptions`; None is the default.

    Returns:
        The winner, its score, the baseline's score, and the study.

    Raises:
        InvalidArgumentError: An argument is not valid, or there are proposers and the space, the sampler or
            the schedule does not allow that; no call was made.
        UnknownOptionError: An option is unknown; the message suggests a similar name.
        TravelError: The score cannot be sent to the workers of the executor; no call was made.
        StudyMismatchError: The study belongs to a search with other candidates, examples, baseline,
            seed or schedule, or was not made by a search; no call was made.
        StudyInUseError: Another run uses the study; no call was made.
        SearchStoppedError: No further call could succeed. ``.study`` has all scores, in memory if the
            storage failed, and ``.result`` the result so far.
        SearchInterrupted: Ctrl-C or SIGTERM (a KeyboardInterrupt), with the same attributes. SIGTERM is
            handled in the main thread only, and only if it has no handler yet.
    """
    _check_arguments(space, score, baseline, seed)
    for name, count in {"n_examples": n_examples, "max_calls": max_calls, "num_threads": num_threads}.items():
        require_count(name, count)
    chosen = SearchOptions.of_search(options, list(inspect.signature(search).parameters))
    check_proposers(proposers)
    if candidates is not None and not all(hasattr(candidates, name) for name in ("plain", "adopt")):
        raise InvalidArgumentError(
            f"candidates must be an object with the methods `plain` and `adopt`; got {candidates!r}."
        )
    if proposers:
        _check_growth(space, chosen)
        space = space.growing()
    task = Task(
        n_examples=n_examples,
        max_calls=max_calls,
        baseline=space.first() if baseline is None else space.row(baseline),
        space_size=space.size,
        seed=seed,
        num_threads=num_threads,
        is_combined=space.combinations is None and len(set(space.groups)) > 1,
        allocates=is_qei(chosen.sampler),
    )
    _warn_of_low_budget(chosen.plan(task, ScoreTable(n_examples)))
    budget = budget or Budget(chosen.limits, grace=chosen.grace)
    retry, stopped = retry or chosen.retry, stopped or threading.Event()
    study = open_study(chosen.storage, chosen.study_name)
    growth = _growth(space, proposers, max_calls)
    with (
        budget.ending(),
        handled(),
        held(study, stopped) as lease,
        measuring(score, Workplace(chosen.executor), num_threads, retry, stopped) as (score, pool),
        threads() as executor,
    ):
        judged = partial(_verdict_on_proposal, classify), _REQUESTS, retry_after
        attempts = Attempts(*judged, THREADS, stopped, budget.admits)
        meter = budget.step(PROPOSE) if proposers else Meter()
        asking = executor, attempts, meter, stopped.is_set
        writing = Writing(growth, seed, *asking, candidates or Texts(), retry.timeout)
        workers = Workers(score, pool, classify, retry, retry_after, num_threads, budget.admits, stopped)
        loop = _prepare(space, task, chosen, lease, workers, budget, writing)
        with metered(budget.begin_search()):
            return loop.run()


def _growth(space: PromptSpace, proposers: Sequence[Proposer], max_calls: int) -> Growth:
    return Growth(
        space,
        proposers={proposer.name: proposer for proposer in sorted(proposers, key=lambda one: one.name)},
        capacity=capacity_of(space, max_calls) if proposers else {},
        gains={proposer.name: gain_of(proposer) for proposer in proposers},
    )


def _verdict_on_proposal(classify: Classify, error: BaseException) -> Verdict:
    """The verdict on an error of a proposer: no such error ends a search."""
    if isinstance(error, CallTimeoutError):  # it would make the search wait again
        return Verdict.CANDIDATE
    verdict = classify(error)
    return verdict if verdict in INFRASTRUCTURE else Verdict.CANDIDATE


def _check_arguments(space: Any, score: Any, baseline: Any, seed: Any) -> None:
    if not isinstance(space, PromptSpace):
        raise InvalidArgumentError(f"space must be a PromptSpace; got {space!r}.")
    if not callable(score):
        raise InvalidArgumentError(f"score must be a function score(params, example); got {score!r}.")
    if not isinstance(baseline, Mapping | None):
        raise InvalidArgumentError(f"baseline must map each component to an index; got {baseline!r}.")
    require_count("seed", seed, least=None)


def _check_growth(space: PromptSpace, options: SearchOptions) -> None:
    """Require a search in which candidates can be added to the space."""
    if not options.can_adapt:
        raise InvalidArgumentError(
            "proposers need sampler='qei' and schedule='blocks'; got sampler="
            f"{options.sampler!r} and schedule={options.schedule!r}."
        )
    if space.combinations is not None:
        raise InvalidArgumentError(
            f"proposers need a space with all combinations of its candidates; got {space!r} with "
            f"{len(space.combinations)} listed ones."
        )
    if options.executor is not None and Workplace(options.executor).threads is None:
        raise InvalidArgumentError(
            "proposers need an executor whose workers know what is written while the search runs: leave it "
            f"out, or pass a ThreadPoolExecutor; got {options.executor!r}."
        )


def _warn_of_low_budget(plan: Plan) -> None:
    n_examples, max_calls = plan.task.n_examples, plan.task.max_calls
    if plan.measures_baseline and 4 * n_examples > max_calls:
        logger.warning(
            "Measuring the winner and the baseline on all %d validation examples takes up to %d of "
            "max_calls=%d, which leaves few calls for the search. Raise max_calls, use fewer validation "
            "examples, or pass confirm=False.",
            *(n_examples, 2 * n_examples, max_calls),
        )


def _prepare(
    space: PromptSpace,
    task: Task,
    options: SearchOptions,
    lease: Lease,
    workers: Workers,
    budget: Budget,
    writing: Writing,
) -> Loop:
    """The loop on the study: compares settings, reads the record and sets the sampler.

    Raises:
        InvalidArgumentError: The budget is too low to continue the study.
        StudyMismatchError: The study belongs to another search.
        StorageError: The study is damaged.
    """
    study, table, growth = lease.study, ScoreTable(task.n_examples), writing.growth
    sampler = options.made_sampler(task.seed)
    with readable(f"What {named(study)} says of its search"):
        before = recorded_settings(study)
        own = sampler.batch_size if isinstance(sampler, qEISampler) else None
        plan = options.plan(task, table, own or before.get("batch_size"))
        if before.get("batch_size") == plan.batch_size:  # trials must not depend on the number of threads
            plan.batches_in_flight = int(before["batches_in_flight"])
        growth.capacity = before.get("capacity", growth.capacity)
        growth.gains = {name: Gain(*gain) for name, gain in before.get("gains", growth.gains).items()}
        settings = settings_of(space, task, options.schedule_name, plan, growth)
        require_same(study, before, settings)
    require_readable(study, distributions_of(space, growth.capacity), task.n_examples)
    record = read_record(study)
    missing = _missing_of_baseline(record, space, task) if plan.measures_baseline else set()
    proposals = [recorded.proposal for recorded in record if recorded.proposal is not None]
    check_left(record, task.max_calls, len(missing), sum(map(growth.calls_of, proposals)))
    made = resolve_sampler(sampler, space, task.seed, len(study.get_trials(deepcopy=False)))
    study.sampler, encoding = bind(made, space, plan.is_open, task.seed)
    if made is options.sampler and record:  # otherwise it would draw the same numbers as in the first run
        study.sampler.reseed_rng()
    write_settings(study, settings, encoding)
    budget.step(SEARCH).add(sum((recorded.usage for recorded in record), Usage()))
    cold = sampler.min_cold_start if isinstance(sampler, qEISampler) else 1
    if growth.proposers:  # nothing is proposed before there is a model
        cold = min(cold, space.size)
    return Loop(
        space,
        plan,
        workers,
        Trials(study, space, record, lease, growth),
        Evidence(encoding, table, cold, growth),
        writing,
        budget,
        options.failure_score,
        options.callbacks,
        options.on_progress,
        options.grace,
    )


def _missing_of_baseline(record: Record, space: PromptSpace, task: Task) -> set[int]:
    """The examples that the baseline lacks, without those of its open trials, which continue."""
    missing = set(table_of(record, space, task.n_examples).missing(task.baseline))
    for recorded in record:
        if not recorded.told and recorded.params == space.params(task.baseline):
            missing -= set(recorded.examples or ())
    return missing
