"""`search`: the engine by itself, without DSPy."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from optuna.samplers import BaseSampler

from mpromptune.engine.batches import BatchPlan
from mpromptune.engine.coordinator import Callback, Coordinator
from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.minibatches import MiproPlan
from mpromptune.engine.options import check_schedule
from mpromptune.engine.pairs import Pairs
from mpromptune.engine.plan import Plan
from mpromptune.engine.result import SearchResult
from mpromptune.engine.schedule import (
    Confirm,
    Minibatches,
    check_block_size,
    check_budget,
    default_block_size,
    warn_of_little,
)
from mpromptune.engine.setup import Setup
from mpromptune.engine.trials import Trials
from mpromptune.errors import require_count, require_finite
from mpromptune.execution.attempts import Classify, RetryAfter, RetryPolicy, no_hint
from mpromptune.execution.interrupts import GRACE, handled
from mpromptune.execution.limits import SEARCH, Budget, Limits
from mpromptune.execution.pool import Score, Workers, as_score, classify_builtin
from mpromptune.execution.remote import ExecutorSpec, Workplace, measuring
from mpromptune.execution.usage import Usage, metered
from mpromptune.model.space import PromptSpace, Row
from mpromptune.model.statistics import Stopping
from mpromptune.sampling.sampler import qEISampler
from mpromptune.sampling.samplers import is_qei
from mpromptune.show.progress import OnProgress
from mpromptune.storage.lease import Lease, held
from mpromptune.storage.storage import StorageSpec, open_study


def search(
    space: PromptSpace,
    score: Score,
    *,
    n_examples: int,
    max_calls: int,
    sampler: BaseSampler | str | None = None,
    num_threads: int = 8,
    batch_size: int | None = None,
    block_size: int | None = None,
    baseline: Mapping[str, int] | None = None,
    seed: int = 0,
    storage: StorageSpec = None,
    study_name: str | None = None,
    callbacks: Sequence[Callback] = (),
    confirm: Confirm = "auto",
    patience: int | None = None,
    target: float | None = None,
    schedule: str = "blocks",
    minibatch: bool = True,
    minibatch_size: int = 35,
    minibatch_full_eval_steps: int = 5,
    executor: ExecutorSpec = None,
    classify: Classify = classify_builtin,
    retry: RetryPolicy | None = None,
    retry_after: RetryAfter = no_hint,
    grace: float = GRACE,
    failure_score: float = 0.0,
    on_progress: OnProgress | None = None,
    limits: Limits | Budget | None = None,
    stopped: threading.Event | None = None,
) -> SearchResult:
    """Finds the configuration with the highest mean score for a budget of program calls.

    Batches of ``batch_size`` blocks are measured, several at a time; a block is ``block_size`` examples of
    one configuration, which may have several. With ``"qei"`` the configurations are those that may be the
    best when all calls are spent, and the examples mostly those that tell the leaders apart (see
    docs/mathematics.md); no pair of configuration and example is paid for twice. With ``schedule="mipro"``
    trials are measured on random minibatches instead and, now and then, the best one so far on all examples,
    as in DSPy's MIPROv2. Proposals depend on ``seed``, on ``batch_size``, on the number of batches in flight
    (the same for up to 32 threads) and on what earlier batches measured, never on timing.

    With ``storage`` every score is saved as it comes in, and the same call goes on where the last one
    ended, however it ended. After ``kill -9`` the trials of ``"qei"`` are those of a search in one go;
    trials that an error or an interrupt cut off are taken up under new numbers. No saved score is paid
    again, and a finished search is returned without a call. ``max_calls`` is for all runs together; it
    may change, as may ``confirm``, ``patience``, ``target``, ``failure_score``, ``num_threads``, the
    sampler and the callbacks, which are not called again. A study takes one run at a time: it
    belongs to that run until it ends. After ``kill -9`` it is free at once on the same host, and
    elsewhere after a minute, for which the next run waits.

    Args:
        space: The configurations.
        score: ``score(params, example) -> float``, the higher the better; called from threads.
        n_examples: Size of the validation set; examples are ``0 .. n_examples - 1``.
        max_calls: Calls of ``score`` to spend. Fewer are spent when nothing is left to measure.
        sampler: ``"qei"`` (default), ``"tpe"``, ``"gp"``, ``"random"``, or an Optuna sampler.
        num_threads: Calls in flight at once.
        batch_size: Blocks in a batch (q); by default as before in a study that is gone on with, otherwise 6,
            fewer where there are fewer than 1200 calls.
        block_size: Examples of a block; by default 5, or 3 where several predictors are combined.
        baseline: Configuration to compare with; by default the first of the space.
        seed: Fixes blocks, proposals and so the whole search.
        storage: Path of a journal file, URL of a database, or an Optuna storage; None for memory.
        study_name: Name of the study in the storage, by default ``"mpromptune"``.
        callbacks: Called as ``callback(study, trial)`` after every finished trial, in the order in which
            they are told.
        confirm: ``"auto"`` ends with the winner measured on every example where that takes no more than a
            fifth of the calls, and with the baseline measured until it is 95 % sure which of the two is
            better. True keeps calls back so that both end measured on every example, False none.
        patience: Stop after so many batches in a row after which, by the posterior, no open
            configuration is expected to gain over the leader a tenth of a full evaluation's
            standard error. None: never. It cannot judge where all scores are the same.
        target: Stop exploring once the leader's posterior mean is at or above this mean score; go
            on if, fully measured, it is not.
        schedule: ``"blocks"`` or ``"mipro"``.
        minibatch: (mipro) False measures every trial on all examples.
        minibatch_size: (mipro) Examples of a trial.
        minibatch_full_eval_steps: (mipro) Trials from one full evaluation to the next.
        executor: Where scores are computed; by default threads. Any ``concurrent.futures.Executor``, which
            is left open, or a callable that makes one, which is made anew when it breaks. To all but a
            ``ThreadPoolExecutor`` the score travels (by cloudpickle), but no context variable does. It
            should have room for ``num_threads`` calls: what waits in its queue nears its ``timeout``.
        classify: The verdict on an exception of ``score``.
        retry: How infrastructure errors are retried, and after how long an attempt is given up.
        retry_after: Seconds that an exception of ``score`` asks to wait, or None.
        grace: Seconds that Ctrl-C, SIGTERM and a limit in seconds leave to calls in flight. No other
            call begins; a second Ctrl-C does not wait. SIGTERM is listened to in the main thread, unless it
            has a handler already.
        failure_score: What an example scores when the candidate itself failed on it.
        on_progress: Called as ``on_progress(progress)`` with a `Progress`: at the beginning, after every
            round, about twice a second while calls are awaited, and at the end. In the thread that
            searches, so it should not take long; an error in it is logged, and it is not called again.
        limits: On tokens, money and time: ``score`` calls `mpromptune.execution.usage.record` to say what it
            used. Exploration ends early enough to confirm the winner as far as can be foreseen; no
            call begins once a limit is used up. A `Budget` where something was used before.
        stopped: Set from outside, no further call begins; set when nothing more may be spent.

    Returns:
        The winner, its score, the baseline's, and the study.

    Raises:
        InvalidArgumentError: An argument cannot work; no call was made.
        TravelError: The score cannot be sent to the workers of the executor; no call was made.
        StudyMismatchError: The study belongs to a search with other candidates, examples, baseline,
            seed or schedule, or to none; no call was made.
        StudyInUseError: Another run is at work on the study; no call was made.
        SearchStoppedError: No further call could succeed; ``.study`` keeps what was measured, in memory
            where the storage failed, and ``.result`` is what can be said from it.
        SearchInterrupted: By Ctrl-C or SIGTERM (a KeyboardInterrupt), with the same.
    """
    _check_counts(n_examples=n_examples, max_calls=max_calls, num_threads=num_threads)
    _check_given(batch_size=batch_size, block_size=block_size, patience=patience)
    if target is not None:
        require_finite("target", target)
    require_finite("grace", grace)
    as_score(failure_score)
    check_schedule(schedule, block_size, confirm, patience, target)
    start = space.first() if baseline is None else space.row(baseline)
    plan: Plan
    if schedule == "mipro":
        batches = Minibatches(minibatch_size, minibatch_full_eval_steps, minibatch).within(n_examples)
        trial_size, sizes = batches.size, batches.as_arguments()
        plan = MiproPlan(n_examples, max_calls, start, space.size, 1, batches, seed, is_qei(sampler))
    else:
        plan = _batches(space, n_examples, max_calls, start, block_size, confirm)
        plan.stopping, plan.allocates, plan.seed = Stopping(target, patience), is_qei(sampler), seed
        trial_size, sizes = plan.block_size, {"block_size": plan.block_size}
    arguments = {"n_examples": n_examples, "baseline": space.params(start), "seed": seed}
    arguments.update(schedule=schedule, **sizes)
    confirmed = confirm is True and schedule == "blocks"  # mipro measures the baseline first of all
    setup = Setup(space, plan, arguments, sampler, batch_size, num_threads, trial_size, confirmed)
    budget = limits if isinstance(limits, Budget) else Budget(limits, grace=grace)
    told: dict[str, Any] = {
        "failure_score": failure_score,
        "callbacks": callbacks,
        "on_progress": on_progress,
        "grace": grace,
    }
    run = partial(Coordinator, space=space, plan=plan, budget=budget, **told)
    stopped, place = stopped or threading.Event(), Workplace(executor)
    study = open_study(storage, study_name)
    with (
        budget.ending(),
        handled(),
        held(study, stopped) as lease,
        measuring(score, place, num_threads, retry, stopped) as (score, pool),
    ):
        workers = Workers(score, pool, classify, retry, retry_after, num_threads, budget.admits, stopped)
        return _run(setup, lease, budget, run, workers)


def _batches(
    space: PromptSpace, n_examples: int, max_calls: int, start: Row, block_size: int | None, confirm: Confirm
) -> BatchPlan:
    is_combined = space.combinations is None and len(set(space.groups)) > 1
    size = block_size or default_block_size(n_examples, is_combined)
    check_budget(max_calls, n_examples, confirm)
    warn_of_little(max_calls, n_examples, confirm)
    check_block_size(size, n_examples)
    return BatchPlan(Pairs(n_examples, max_calls), start, space.size, size, confirm=confirm)


def _run(
    setup: Setup, lease: Lease, budget: Budget, run: partial[Coordinator], workers: Workers
) -> SearchResult:
    study = lease.study
    record, encoding = setup.take_up(study)
    budget.step(SEARCH).add(sum((recorded.usage for recorded in record), Usage()))
    trials = Trials(study, setup.space, record, lease)
    cold = setup.sampler.min_cold_start if isinstance(setup.sampler, qEISampler) else 1
    known = Knowledge(study, encoding, setup.plan.n_examples, cold)
    with metered(budget.begin_search()):
        return run(workers=workers, trials=trials, known=known).run()


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        require_count(name, count)


def _check_given(**counts: int | None) -> None:
    _check_counts(**{name: count for name, count in counts.items() if count is not None})
