"""Searches on threads, processes and Dask: workers that die, calls that hang, and what cannot travel."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from embedders import letters
from remote_scores import TEXTS, Distant, HangingOnce, N, Raising, Written, value, write, written
from tasks import is_spent

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.errors import (
    ExecutorBrokenError,
    InvalidArgumentError,
    ScoreError,
    SearchInterrupted,
    SearchStoppedError,
    TravelError,
)
from mpromptune.execution import worker
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.remote import Workplace, remote_score
from mpromptune.execution.usage import Usage, metered, record

SPAWN = multiprocessing.get_context("spawn")
SPACE = PromptSpace(TEXTS)
CALLS = 120
# Seconds after which a test has failed: what hangs is to hold up nothing.
PATIENCE = 120


def run(score: Any, **arguments: Any) -> SearchResult:
    """A small search: nine trials or so."""
    given = {
        "n_examples": N,
        "max_calls": CALLS,
        "sampler": qEISampler(embedder=letters, seed=0, batch_size=2, n_batches=0),
        "num_threads": 4,
        **arguments,
    }
    return search(SPACE, score, **given)


def trials_of(result: SearchResult) -> list[Any]:
    return [(t.number, t.params, t.value) for t in result.study.trials]


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=SPAWN)


@pytest.fixture(scope="module")
def undisturbed() -> SearchResult:
    """The search on threads of its own, which spends its budget as far as anything can still win."""
    result = run(value)
    assert is_spent(result, CALLS)
    return result


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    """A scheduler, and two worker processes of two threads."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0", memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "dask":
        yield request.getfixturevalue("dask")
        return
    with ThreadPoolExecutor(4) if request.param == "threads" else processes() as pool:
        yield pool


def test_every_executor_gives_the_same_search(
    executor: Executor, undisturbed: SearchResult, tmp_path: Path
) -> None:
    """Trials and winner are those of threads, each pair is asked once, and the executor stays open."""
    result = run(Written(tmp_path / "log"), executor=executor)
    assert trials_of(result) == trials_of(undisturbed)
    assert result.best_params == undisturbed.best_params
    started, ended = written(tmp_path / "log", "start"), written(tmp_path / "log", "end")
    assert started == ended
    assert set(ended.values()) == {1}
    assert result.calls == result.usage.total.program_calls == ended.total()
    assert executor.submit(abs, -3).result(PATIENCE) == 3


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_a_killed_worker_loses_no_trial(
    kind: str, request: pytest.FixtureRequest, undisturbed: SearchResult, tmp_path: Path
) -> None:
    """After a SIGKILL in mid-run what was under way is asked again: every score is there, and told once."""
    executor = processes if kind == "processes" else request.getfixturevalue("dask")
    result = run(Written(tmp_path / "log", dies=90, latency=0.005), executor=executor)
    assert (tmp_path / "log.killed").exists()
    assert trials_of(result) == trials_of(undisturbed)
    assert result.best_params == undisturbed.best_params
    started, ended = written(tmp_path / "log", "start"), written(tmp_path / "log", "end")
    assert set(started) == set(ended)
    assert result.calls == len(ended)
    # What one worker had in hand was begun twice; nothing else was.
    assert 1 <= started.total() - len(ended) <= 4
    assert result.calls <= result.usage.total.program_calls <= result.calls + 4


def test_a_broken_pool_that_was_given_ends_the_search_with_what_was_measured(tmp_path: Path) -> None:
    """The error says how to give one that is made anew, and the same call goes on."""
    storage = tmp_path / "study.log"
    with (
        processes() as pool,
        pytest.raises(SearchStoppedError, match="lambda: ProcessPoolExecutor") as caught,
    ):
        run(Written(tmp_path / "log", dies=90, latency=0.005), executor=pool, storage=storage)
    assert isinstance(caught.value.__cause__, ExecutorBrokenError)
    assert 0 < caught.value.result.calls < CALLS
    again = run(Written(tmp_path / "log"), storage=storage)
    ended = written(tmp_path / "log", "end")
    assert caught.value.result.calls < again.calls == len(ended) <= CALLS
    assert next(m for m in again.configurations if m.params == again.best_params).fully
    # What had come back was kept; what was on its way back is asked again.
    assert ended.total() - len(ended) <= 4


def test_what_cannot_travel_is_refused_before_any_call(undisturbed: SearchResult, tmp_path: Path) -> None:
    """A score with a lock is named, no call is made, and threads take it."""
    score = Written(tmp_path / "log")
    score.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(TravelError, match=r"The score cannot be sent.*lock"):
        run(score, executor=Distant())
    assert not (tmp_path / "log").exists()
    with ThreadPoolExecutor(2) as pool:
        assert run(score, executor=pool).calls == undisturbed.calls


class Unloadable:
    """Can be pickled, and not be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("home",)

    def __call__(self, params: dict[str, int], example: int) -> float:
        raise AssertionError


def test_what_cannot_arrive_is_refused_before_any_call() -> None:
    """What goes wrong in the worker is named as well."""
    with pytest.raises(TravelError, match=r"The score cannot be sent.*invalid literal.*home"):
        run(Unloadable(), executor=Distant())


@pytest.mark.parametrize("given", [3, "dask", object()])
def test_what_is_no_executor_is_refused(given: Any) -> None:
    """Anything but an executor, or a callable that makes one, is an error that names it."""
    with pytest.raises(InvalidArgumentError, match="executor must be"):
        run(value, executor=given)
    with pytest.raises(InvalidArgumentError, match="executor must make"):
        run(value, executor=lambda: given)


def test_a_score_travels_once_and_its_usage_comes_back(undisturbed: SearchResult) -> None:
    """It need not be importable; a worker that holds it is sent indices only."""

    def score(params: dict[str, int], example: int, ballast: bytes = bytes(1_000_000)) -> float:
        record(Usage(lm_calls=2, prompt_tokens=10, cost=0.5))
        return value(params, example)

    executor = Distant()
    result = run(score, executor=executor)
    assert 1_000_000 < executor.sent < 1_200_000
    assert trials_of(result) == trials_of(undisturbed)
    used, calls = result.usage.total, undisturbed.calls
    assert (used.lm_calls, used.prompt_tokens, used.cost) == (2 * calls, 10 * calls, 0.5 * calls)


def test_a_worker_that_lacks_the_score_is_sent_it() -> None:
    """One that came later, or has dropped it for newer ones, says so; that is no attempt, and not counted."""
    params = {"0_predictor_instruction": 3, "0_predictor_demos": 2}
    with Workplace(Distant()) as place, remote_score(place, value, {}) as remote, metered() as meter:
        first = remote(params, 0)
        for key in map(str, range(20)):
            assert worker.hold(key, worker.pack(value, {})) is None
        assert list(worker._HELD) == [str(key) for key in range(12, 20)]
        assert remote(params, 0) == first
        assert meter.total == Usage()


def test_infrastructure_errors_are_retried(undisturbed: SearchResult, tmp_path: Path) -> None:
    """An error comes back with its type: another attempt is made, and counted."""
    result = run(Raising(tmp_path / "log", BrokenPipeError(32, "gone")), executor=Distant())
    assert trials_of(result) == trials_of(undisturbed)
    made = result.usage.total.program_calls
    assert made == undisturbed.calls + 1 == written(tmp_path / "log", "start").total()


def test_a_bad_score_stops_the_search() -> None:
    """As it does in threads; the cause is the worker's error, which says where it was raised."""
    with pytest.raises(SearchStoppedError) as caught:
        run(lambda params, example: None, executor=Distant())
    assert isinstance(caught.value.__cause__, ScoreError)
    assert "as_score" in str(caught.value.__cause__.__cause__)


class Losing(Distant):
    """Loses the first calls of scores."""

    def __init__(self, losses: int) -> None:
        super().__init__()
        self.losses = losses

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if fn.__name__ == "perform" and self.losses:
            self.losses -= 1
            future: Future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future
        return super().submit(fn, *args, **kwargs)


def test_a_call_that_its_executor_gives_up_is_made_again(undisturbed: SearchResult) -> None:
    """A cancelled future is a lost worker, as Dask's are when its scheduler loses them."""
    result = run(value, executor=Losing(3), retry=RetryPolicy(max_wait=0.01))
    assert trials_of(result) == trials_of(undisturbed)
    assert result.usage.total.program_calls == undisturbed.calls + 3


RELEASE = threading.Event()


def hanging(params: dict[str, int], example: int) -> float:
    if example == 0 and not RELEASE.is_set():
        RELEASE.wait(PATIENCE)
    return value(params, example)


def test_a_call_that_hangs_is_given_up(undisturbed: SearchResult) -> None:
    """After its timeout another attempt is made elsewhere."""
    RELEASE.clear()
    threading.Timer(0.5, RELEASE.set).start()
    result = run(hanging, executor=Distant(8), retry=RetryPolicy(timeout=0.2, max_wait=0.01))
    RELEASE.set()
    assert trials_of(result) == trials_of(undisturbed)
    assert result.usage.total.program_calls > undisturbed.calls


def test_a_stop_withdraws_what_has_not_begun() -> None:
    """Calls that wait in the executor's queue are cancelled; the one under way is left its grace."""
    RELEASE.clear()
    executor, stopped = Distant(1), threading.Event()
    found: list[Exception] = []

    def go() -> None:
        try:
            run(hanging, executor=executor, stopped=stopped, num_threads=4, grace=0.1)
        except Exception as error:  # noqa: BLE001 - looked at below
            found.append(error)

    def hung() -> bool:
        return any(f.running() for f in executor.futures[1:])

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    while not (hung() and sum(not f.done() for f in executor.futures) == 4):
        thread.join(0.01)
    stopped.set()
    queued = [f for f in executor.futures if not f.done() and not f.running()]
    while not all(f.cancelled() for f in queued):
        thread.join(0.01)
    RELEASE.set()
    thread.join(PATIENCE)
    assert isinstance(found[0], SearchStoppedError)
    assert len(queued) == 3


def test_all_workers_of_dask_are_used(dask: Executor, tmp_path: Path) -> None:
    """Both processes make at least a third of the calls, and four are under way at a time."""
    log = tmp_path / "log"
    result = run(Written(log, latency=0.05), executor=dask)
    shares = written(log, "by")
    assert len(shares) == 2
    assert min(shares.values()) >= result.calls / 3
    steps = [line.split()[0] for line in log.read_text().splitlines()]
    under_way = [steps[:i].count("start") - steps[:i].count("end") for i in range(len(steps))]
    assert max(under_way) == 4


def test_a_stop_reaches_the_workers_of_dask(dask: Executor, tmp_path: Path) -> None:
    """What waits in its queue asks nothing more, and what is under way comes back and is kept."""
    log, stopped = tmp_path / "log", threading.Event()
    score = Written(log, latency=0.02)
    with pytest.raises(SearchStoppedError, match="a request from outside") as caught:
        run(score, executor=dask, num_threads=16, stopped=stopped, callbacks=[lambda *_: stopped.set()])
    for future in [dask.submit(abs, -i) for i in range(20)]:  # behind whatever is queued
        future.result(PATIENCE)
    started, ended = written(log, "start").total(), written(log, "end").total()
    assert started == ended == caught.value.result.calls < CALLS


def test_workers_that_cannot_start_are_an_error_before_any_call() -> None:
    """An executor that loses whatever it is given says so at once, and not call by call."""

    class Void(Losing):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
            return super().submit(lost, *args, **kwargs)

    def lost() -> None:
        raise AssertionError

    lost.__name__ = "perform"
    with pytest.raises(ExecutorBrokenError, match="installed where they run.*No call was made"):
        run(value, executor=Void(10))


def test_a_process_that_hangs_does_not_outlive_the_search(undisturbed: SearchResult, tmp_path: Path) -> None:
    """Its call is made again by another one; what the search has started, it ends."""
    others = set(multiprocessing.active_children())
    retry = RetryPolicy(timeout=2.0, max_wait=0.01)
    result = run(HangingOnce(tmp_path / "log"), executor=processes, retry=retry, num_threads=2)
    assert (tmp_path / "log.hangs").exists()
    assert trials_of(result) == trials_of(undisturbed)
    for process in set(multiprocessing.active_children()) - others:
        # NOTE: not `is_alive`, which is wrong while the executor's own thread is reaping the process.
        assert multiprocessing.connection.wait([process.sentinel], PATIENCE)


def search_until_interrupted(log: Path) -> None:
    """A search in a process group of its own; what it has kept is written down."""
    os.setsid()
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        try:
            run(Written(log, latency=0.05), executor=pool, sampler="random", num_threads=8, grace=60)
        except SearchInterrupted as interrupted:
            assert pool.submit(abs, -3).result() == 3
            write(log, f"kept {interrupted.result.calls}")


def test_ctrl_c_leaves_calls_in_processes_their_grace(forks: Any, tmp_path: Path) -> None:
    """The terminal sends it to every process; that of the pool finishes what it has begun, and no more."""
    log = tmp_path / "log"
    process = forks.Process(target=search_until_interrupted, args=(log,))
    process.start()
    while written(log, "end").total() < 5 and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    started, ended = written(log, "start").total(), written(log, "end").total()
    assert written(log, "kept") == {str(ended): 1}
    assert started == ended < CALLS
