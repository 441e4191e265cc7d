"""`search`: the engine by itself, without DSPy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor

import optuna
from optuna.samplers import BaseSampler

from mpromptune.attributes import N_EXAMPLES
from mpromptune.block_plan import BlockPlan
from mpromptune.coordinator import Callback, Coordinator, OnCall
from mpromptune.daemons import DaemonThreads
from mpromptune.errors import require_count, require_finite
from mpromptune.execution import (
    Classify,
    RetryAfter,
    RetryPolicy,
    Score,
    Workers,
    as_score,
    classify_builtin,
    no_hint,
)
from mpromptune.interrupts import GRACE, handled
from mpromptune.knowledge import Knowledge
from mpromptune.mipro_plan import MiproPlan
from mpromptune.options import check_schedule
from mpromptune.plan import Plan
from mpromptune.result import SearchResult
from mpromptune.samplers import bind, resolve_sampler, round_size
from mpromptune.schedule import (
    Minibatches,
    Schedule,
    check_budget,
    default_block_size,
    default_rounds_in_flight,
    partition,
)
from mpromptune.space import PromptSpace
from mpromptune.stopping import Stopping


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
    storage: str | optuna.storages.BaseStorage | None = None,
    study_name: str | None = None,
    callbacks: Sequence[Callback] = (),
    confirm: bool = True,
    patience: int | None = None,
    target: float | None = None,
    schedule: str = "blocks",
    minibatch: bool = True,
    minibatch_size: int = 35,
    minibatch_full_eval_steps: int = 5,
    executor: Executor | None = None,
    classify: Classify = classify_builtin,
    retry: RetryPolicy | None = None,
    retry_after: RetryAfter = no_hint,
    grace: float = GRACE,
    failure_score: float = 0.0,
    on_call: OnCall | None = None,
) -> SearchResult:
    """Finds the configuration with the highest mean score for a budget of program calls.

    Rounds of ``batch_size`` configurations are measured on one shared block of examples each, two
    rounds at a time; promising configurations are measured on further blocks; no example of a
    configuration is paid for twice. With ``schedule="mipro"`` trials are measured on random
    minibatches instead and, now and then, the best one so far on all examples, as in DSPy's MIPROv2.
    Proposals depend on ``seed``, on ``batch_size`` (by default a round has a call for every thread),
    on the number of rounds in flight (more than two from 41 threads on) and on what earlier rounds
    measured, never on timing.

    Args:
        space: The configurations.
        score: ``score(params, example) -> float``, the higher the better; called from threads.
        n_examples: Size of the validation set; examples are ``0 .. n_examples - 1``.
        max_calls: Calls of ``score`` to spend. Fewer are spent when no configuration that
            could still win, and be fully measured, is left; with more than 40 threads, when less
            than half a round is left.
        sampler: ``"qei"`` (default), ``"tpe"``, ``"gp"``, ``"random"``, or an Optuna sampler.
        num_threads: Calls in flight at once.
        batch_size: Configurations per round (q); by default enough to occupy all threads.
        block_size: Examples per block (default 10, or all where there are fewer).
        baseline: Configuration to compare with; by default the first of the space.
        seed: Fixes blocks, proposals and so the whole search.
        storage: Optuna storage, or None for memory.
        study_name: Name of the study in the storage.
        callbacks: Called as ``callback(study, trial)`` after every finished trial, in order.
        confirm: Keep calls back so that winner and baseline end measured on every example. With
            False the winner is the highest posterior mean, whatever it was measured on.
        patience: Stop after so many rounds in a row after which, by the posterior, no open
            configuration is expected to gain over the leader a tenth of a full evaluation's
            standard error. None: never. It cannot judge where all scores are the same.
        target: Stop exploring once the leader's posterior mean is at or above this mean score; go
            on if, fully measured, it is not.
        schedule: ``"blocks"`` or ``"mipro"``.
        minibatch: (mipro) False measures every trial on all examples.
        minibatch_size: (mipro) Examples of a trial.
        minibatch_full_eval_steps: (mipro) Trials from one full evaluation to the next.
        executor: Runs the work items; by default a thread pool of ``num_threads``.
        classify: The verdict on an exception of ``score``.
        retry: How infrastructure errors are retried, and after how long an attempt is given up.
        retry_after: Seconds that an exception of ``score`` asks to wait, or None.
        grace: Seconds that Ctrl-C and SIGTERM leave to calls in flight. No other call begins; a
            second Ctrl-C does not wait. SIGTERM is listened to in the main thread, unless it has a
            handler already.
        failure_score: What an example scores when the candidate itself failed on it.
        on_call: Called as ``on_call(calls, max_calls)`` as results come in.

    Returns:
        The winner, its score, the baseline's, and the study.

    Raises:
        InvalidArgumentError: An argument cannot work; no call was made.
        SearchStoppedError: No further call could succeed; ``.study`` keeps what was measured, and
            ``.result`` is what can be said from it.
        SearchInterrupted: By Ctrl-C or SIGTERM (a KeyboardInterrupt), with the same.
    """
    require_count("n_examples", n_examples)
    require_count("max_calls", max_calls)
    require_count("num_threads", num_threads)
    optional = {"batch_size": batch_size, "block_size": block_size, "patience": patience}
    for name, count in optional.items():
        if count is not None:
            require_count(name, count)
    if target is not None:
        require_finite("target", target)
    require_finite("grace", grace)
    as_score(failure_score)
    check_schedule(schedule, block_size, confirm, patience, target)
    start = space.first() if baseline is None else space.row(baseline)
    plan: Plan
    if schedule == "mipro":
        batches = Minibatches(minibatch_size, minibatch_full_eval_steps, minibatch).within(n_examples)
        q = round_size(batch_size, sampler, num_threads, batches.size)
        plan = MiproPlan(n_examples, max_calls, start, space.size, q, batches, seed)
    else:
        block = default_block_size(n_examples) if block_size is None else block_size
        q = round_size(batch_size, sampler, num_threads, block)
        blocks = partition(n_examples, block, seed)
        check_budget(max_calls, n_examples, confirm)
        plan = BlockPlan(
            Schedule(n_examples, blocks, max_calls, start, confirm),
            space.size,
            q,
            default_rounds_in_flight(num_threads, q, block),
            Stopping(target, patience),
        )
    bound, encoding = bind(resolve_sampler(sampler, space, seed), space, q, plan.is_open, seed)
    study = optuna.create_study(storage=storage, study_name=study_name, sampler=bound, direction="maximize")
    study.set_user_attr(N_EXAMPLES, n_examples)
    with handled(), _executor(executor, num_threads) as pool:
        return Coordinator(
            space=space,
            plan=plan,
            workers=Workers(score, pool, classify, retry, retry_after, num_threads),
            known=Knowledge(study, encoding),
            failure_score=failure_score,
            callbacks=callbacks,
            on_call=on_call,
            grace=grace,
        ).run()


@contextlib.contextmanager
def _executor(given: Executor | None, num_threads: int) -> Iterator[Executor]:
    """The given executor, left open; or threads, which are closed without waiting for a call that hangs."""
    if given is not None:
        yield given
        return
    pool = DaemonThreads(num_threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
