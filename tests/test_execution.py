"""Work items: attempts, refusals, timeouts and cancellation; and searches through all kinds of faults."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from tenacity import RetryCallState, Retrying
from test_engine import SPACE, TABLE, N, Scores, run, trials_of

from mpromptune.engine.batches import BatchPlan
from mpromptune.errors import CallTimeoutError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy, Verdict
from mpromptune.execution.interrupts import Stopped, check_stopped, current_stop, stoppable
from mpromptune.execution.pool import DaemonThreads, Workers, classify_builtin
from mpromptune.storage.attributes import EXAMPLES, SCORES

HASTY = RetryPolicy(attempts=3, max_wait=0.001)


class RefusedError(Exception):
    """A rate limit."""


def classify(error: BaseException) -> Verdict:
    return Verdict.THROTTLE if isinstance(error, RefusedError) else classify_builtin(error)


@pytest.fixture
def pool() -> Iterator[DaemonThreads]:
    threads = DaemonThreads(2)
    yield threads
    threads.shutdown(wait=False)


def test_refusals_are_no_attempts(pool: DaemonThreads) -> None:
    """A hundred rate limits in a row, with three attempts allowed: the score is that of call 101."""
    calls: list[int] = []

    def score(params: dict[str, int], example: int) -> float:
        calls.append(example)
        if len(calls) <= 100:
            raise RefusedError
        return 1.0

    workers = Workers(score, pool, classify, HASTY)
    assert workers.submit({}, 7).result(60).score == 1.0
    assert len(calls) == 101
    assert workers.load.limit == 2  # of 8, it was 1 before the success


def test_refusals_for_too_long_are_infrastructure(pool: DaemonThreads) -> None:
    """Once there is no hope the item fails, as an error that is not the candidate's."""

    def score(params: dict[str, int], example: int) -> float:
        raise RefusedError

    hopeless = RetryPolicy(max_wait=0.001, give_up_after=0.0)
    workers = Workers(score, pool, classify, hopeless)
    outcome = workers.submit({}, 0).result(60)
    assert isinstance(outcome.error, RefusedError)
    assert workers.verdict(outcome) is Verdict.THROTTLE


def test_an_attempt_that_hangs_is_given_up_and_made_again(
    pool: DaemonThreads, caplog: pytest.LogCaptureFixture
) -> None:
    """The second attempt counts; the first is told to spend nothing more, and the log says it is paid.

    Both run in the caller's context, where DSPy's settings live, although each has a thread of its own.
    """
    calls: list[int] = []
    given_up, ended = threading.Event(), threading.Event()
    lm: contextvars.ContextVar[float] = contextvars.ContextVar("lm", default=0.0)
    lm.set(0.5)

    def score(params: dict[str, int], example: int) -> float:
        calls.append(example)
        if len(calls) == 2:
            given_up.set()
            return lm.get()
        assert given_up.wait(60)
        with pytest.raises(Stopped):
            check_stopped()
        ended.set()
        raise Stopped

    workers = Workers(score, pool, retry=RetryPolicy(max_wait=0.001, timeout=0.05))
    with caplog.at_level(logging.WARNING):
        assert workers.submit({"a": 1}, 3).result(60).score == 0.5
    assert ended.wait(60)
    assert len(calls) == 2
    assert "Example 3 with {'a': 1} gave no answer within 0.05 s" in caplog.text


def test_a_call_that_always_hangs_fails_as_infrastructure(pool: DaemonThreads) -> None:
    """After so many attempts, whatever the user's own verdict on errors says."""
    release = threading.Event()

    def score(params: dict[str, int], example: int) -> float:
        release.wait(60)
        return 1.0

    workers = Workers(
        score, pool, lambda error: Verdict.CANDIDATE, RetryPolicy(attempts=2, max_wait=0.001, timeout=0.02)
    )
    outcome = workers.submit({}, 0).result(60)
    release.set()
    assert isinstance(outcome.error, CallTimeoutError)
    assert workers.verdict(outcome) is Verdict.RETRY


def test_whoever_runs_for_nobody_can_know(pool: DaemonThreads) -> None:
    """Inside an attempt, `current_stop` follows the run's stop event and all that stand around it."""
    assert not current_stop()()
    seen: list[Callable[[], bool]] = []

    def score(params: dict[str, int], example: int) -> float:
        seen.append(current_stop())
        return 1.0

    around, own = threading.Event(), Workers(score, pool)
    with stoppable(around.is_set):
        own.submit({}, 0).result(60)
    other = Workers(score, pool)
    other.submit({}, 0).result(60)
    assert [stop() for stop in seen] == [False, False]
    around.set()
    assert [stop() for stop in seen] == [True, False]
    other.stopped.set()
    assert seen[1]()


def test_stopping_ends_the_wait_for_another_attempt(pool: DaemonThreads) -> None:
    """A backoff of minutes is over at once, without another call."""
    called = threading.Event()
    calls: list[int] = []

    def score(params: dict[str, int], example: int) -> float:
        calls.append(example)
        called.set()
        raise ConnectionError("down")

    workers = Workers(score, pool, retry_after=lambda error: 600.0)
    future = workers.submit({}, 0)
    assert called.wait(60)
    workers.stopped.set()
    outcome = future.result(60)
    assert (outcome.score, len(calls)) == (None, 1)


@pytest.mark.parametrize(("asked", "pause"), [(None, 0.0), (30.0, 30.0), (1e9, 3600.0)])
def test_errors_other_than_rate_limits_may_ask_for_a_pause_too(
    pool: DaemonThreads, asked: float | None, pause: float
) -> None:
    """A server that is down for maintenance says so; there is a bound."""
    workers = Workers(
        lambda params, example: 1.0, pool, retry=RetryPolicy(max_wait=0.0), retry_after=lambda e: asked
    )
    state = RetryCallState(Retrying(), None, (), {})
    state.set_exception((ConnectionError, ConnectionError("down"), None))
    assert workers._attempts._pause(state) == pause


def injected(
    share: float, error: Callable[[], BaseException], seed: int = 1
) -> tuple[Any, Scores, list[int]]:
    """A score function of which a share of the calls, drawn by chance, raise."""
    scores, failures, rng, lock = Scores(), [], np.random.default_rng(seed), threading.Lock()

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            fails = rng.random() < share
        if fails:
            failures.append(example)
            raise error()
        return scores(params, example)

    return score, scores, failures


def test_thirty_percent_rate_limits() -> None:
    """Every trial completes, each pair is scored once, and the trials are those without rate limits."""
    score, scores, failures = injected(0.3, RefusedError)
    result = run(score, classify=classify, retry=RetryPolicy(attempts=1, max_wait=0.001))
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    assert result.calls == sum(scores.asked.values()) == len(scores.asked)
    assert len(failures) > 50
    assert trials_of(result) == trials_of(run())


def test_five_percent_timeouts() -> None:
    """Calls that never come back are made again; neither the search nor its end waits for them."""
    release = threading.Event()
    scores, hung, lock = Scores(), Counter(), threading.Lock()

    def score(params: dict[str, int], example: int) -> float:
        key = (SPACE.row(params), example)
        with lock:
            hung[key] += example % 20 == 3
            hangs = hung[key] == 1
        if hangs:
            release.wait()
        return scores(params, example)

    result = run(score, retry=RetryPolicy(max_wait=0.001, timeout=0.25))
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    assert sum(hung.values()) > 10
    assert trials_of(result) == trials_of(run())
    release.set()


def test_an_outage_by_timeouts_stops() -> None:
    """From call 100 on nothing comes back: no zero is recorded, and the search ends."""
    release, scores = threading.Event(), Scores()

    def score(params: dict[str, int], example: int) -> float:
        if sum(scores.asked.values()) >= 100:
            release.wait()
        return scores(params, example)

    with pytest.raises(SearchStoppedError, match="no answer within") as caught:
        run(score, retry=RetryPolicy(attempts=1, timeout=0.2), num_threads=16)
    kept_as_measured(caught.value)
    release.set()


def kept_as_measured(error: SearchStoppedError) -> None:
    """All trials are closed, hold scores of the table, and those that lack some have failed."""
    trials = error.study.trials  # type: ignore[attr-defined]
    for trial in trials:
        examples = trial.user_attrs.get(EXAMPLES, [])
        assert trial.user_attrs.get(SCORES, []) == TABLE[SPACE.row(trial.params)][examples].tolist()
        assert trial.state.is_finished()


@pytest.mark.parametrize("num_threads", [1, 16])
@pytest.mark.parametrize("begins", [60, 203])
def test_an_outage_with_an_unknown_error_is_no_set_of_bad_prompts(num_threads: int, begins: int) -> None:
    """A plain RuntimeError for everybody from some call on, in the middle of a batch or of a trial."""
    calls, lock = [0], threading.Lock()

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            calls[0] += 1
            down = calls[0] > begins
        if down:
            raise RuntimeError("upstream connect error")
        return float(TABLE[SPACE.row(params)][example])

    with pytest.raises(SearchStoppedError, match="upstream connect error") as caught:
        run(score, num_threads=num_threads, batch_size=4, failure_score=-1.0)
    kept_as_measured(caught.value)
    kept = sum(len(t.user_attrs.get(SCORES, ())) for t in caught.value.study.trials)  # type: ignore[attr-defined]
    assert kept == begins
    assert caught.value.result.calls == begins
    assert calls[0] < begins + 3 * 4 * 5 + num_threads  # what was in flight


@pytest.mark.parametrize("broken", [{0}, {1, 2, 3, 4}])
@pytest.mark.parametrize("num_threads", [1, 8])
def test_broken_candidates_do_not_stop_the_search(broken: set[int], num_threads: int) -> None:
    """Demo sets or instructions that are never parsed score failure_score, up to four of six."""

    def score(params: dict[str, int], example: int) -> float:
        if params["0_predictor_instruction"] in broken:
            raise RuntimeError("cannot parse")
        return float(TABLE[SPACE.row(params)][example])

    baseline = {"0_predictor_instruction": 5, "0_predictor_demos": 0}
    result = run(score, failure_score=-1.0, num_threads=num_threads, batch_size=4, baseline=baseline)
    for measured in result.configurations:
        is_broken = measured.params["0_predictor_instruction"] in broken
        assert set(measured.scores.values()) <= ({-1.0} if is_broken else {0.0, 1.0})
    assert result.best_params["0_predictor_instruction"] not in broken


def test_after_an_outage_the_result_so_far_is_at_hand() -> None:
    """`SearchStoppedError.result` has everything measured, the highest posterior mean first."""

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            calls.append(example)
            if len(calls) > 150:
                raise PermissionError("bad key")
        return float(TABLE[SPACE.row(params)][example])

    def verdict(error: BaseException) -> Verdict:
        return Verdict.STOP if isinstance(error, PermissionError) else classify_builtin(error)

    calls: list[int] = []
    lock = threading.Lock()
    with pytest.raises(SearchStoppedError) as caught:
        run(score, classify=verdict)
    result = caught.value.result
    assert result.calls == 150
    assert result.best_params == result.configurations[0].params
    assert result.configurations[0].mean == pytest.approx(
        TABLE[SPACE.row(result.best_params)][list(result.configurations[0].scores)].mean()
    )
    assert len(calls) < 150 + 4 + 1


def test_what_a_stopped_search_returns_is_the_plans_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a limit: a leader with a few lucky answers may be worse than the baseline."""
    monkeypatch.setattr(BatchPlan, "winner", lambda plan, ranked, is_cut_short: ranked[-1])

    def score(params: dict[str, int], example: int) -> float:
        calls.append(example)
        if len(calls) > 100:
            raise ValueError("bad key")
        return float(TABLE[SPACE.row(params)][example])

    calls: list[int] = []
    with pytest.raises(SearchStoppedError) as caught:
        run(score, classify=lambda error: Verdict.STOP)
    result = caught.value.result
    assert result.best_params == result.configurations[-1].params != result.configurations[0].params


def test_a_given_executor_is_left_open() -> None:
    """Its threads are the user's."""
    with ThreadPoolExecutor(4) as given:
        result = run(executor=given)
        assert given.submit(lambda: 1).result(60) == 1
    assert trials_of(result) == trials_of(run())
    assert result.n_examples == N
