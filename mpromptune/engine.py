"""`search`: the engine by itself, without DSPy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import optuna
from optuna.samplers import BaseSampler

from mpromptune.coordinator import Callback, Coordinator, OnCall
from mpromptune.errors import InvalidArgumentError, require_count
from mpromptune.execution import Classify, RetryPolicy, Score, Workers, as_score, classify_builtin
from mpromptune.result import SearchResult
from mpromptune.sampler import qEISampler
from mpromptune.samplers import resolve_sampler
from mpromptune.schedule import Schedule, default_batch_size, partition
from mpromptune.space import PromptSpace


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
    executor: Executor | None = None,
    classify: Classify = classify_builtin,
    retry: RetryPolicy | None = None,
    failure_score: float = 0.0,
    on_call: OnCall | None = None,
) -> SearchResult:
    """Finds the configuration with the highest mean score for a budget of program calls.

    Rounds of ``batch_size`` configurations are measured on one shared block of examples each, two
    rounds at a time; promising configurations are measured on further blocks; no example of a
    configuration is paid for twice. Proposals depend on ``seed``, on ``batch_size`` (which by
    default grows with more than 40 threads) and on what earlier rounds measured, never on timing.

    Args:
        space: The configurations.
        score: ``score(params, example) -> float``, the higher the better; called from threads.
        n_examples: Size of the validation set; examples are ``0 .. n_examples - 1``.
        max_calls: Calls of ``score`` to spend. Fewer are spent when no configuration that
            could still win, and be fully measured, is left.
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
        executor: Runs the work items; by default a thread pool of ``num_threads``.
        classify: The verdict on an exception of ``score``.
        retry: How infrastructure errors are retried.
        failure_score: What an example scores when the candidate itself failed on it.
        on_call: Called as ``on_call(calls, max_calls)`` as results come in.

    Returns:
        The winner, its score, the baseline's, and the study.

    Raises:
        InvalidArgumentError: An argument cannot work; no call was made.
        SearchStoppedError: No further call could succeed; ``.study`` keeps what was measured.
    """
    require_count("n_examples", n_examples)
    require_count("num_threads", num_threads)
    if batch_size is not None:
        require_count("batch_size", batch_size)
    as_score(failure_score)
    block = min(10, n_examples) if block_size is None else block_size
    start = space.first() if baseline is None else space.row(baseline)
    schedule = Schedule(n_examples, partition(n_examples, block, seed), max_calls, start, confirm)
    _require_budget(schedule)
    q = batch_size or _own_batch_size(sampler) or default_batch_size(num_threads, block)
    with _executor(executor, num_threads) as pool:
        run = Coordinator(
            space=space,
            schedule=schedule,
            workers=Workers(score, pool, classify, retry),
            batch_size=q,
            failure_score=failure_score,
            callbacks=callbacks,
            on_call=on_call,
        )
        run.open_study(resolve_sampler(sampler, space, seed), seed, storage, study_name)
        return run.run()


def _own_batch_size(sampler: object) -> int | None:
    return sampler.batch_size if isinstance(sampler, qEISampler) else None


def _require_budget(schedule: Schedule) -> None:
    least = 2 * schedule.n_examples if schedule.confirm else 1
    if schedule.max_calls < least:
        raise InvalidArgumentError(
            f"max_calls={schedule.max_calls} is below the {least} calls that measuring the winner and the "
            f"baseline on all {schedule.n_examples} examples takes. Raise max_calls, use fewer "
            "validation examples, or pass confirm=False."
        )


@contextlib.contextmanager
def _executor(given: Executor | None, num_threads: int) -> Iterator[Executor]:
    """The given executor, left open; or a thread pool, closed without waiting for queued items."""
    if given is not None:
        yield given
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="mpromptune")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
