"""Limits on tokens, money and time; caps per minute; equal requests. All against clocks that stand still."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import pytest
from clocks import Clock

from mpromptune import PromptSpace, search
from mpromptune.engine import loop
from mpromptune.engine.plan import best_so_far
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.limits import Budget, Limits
from mpromptune.execution.pace import Flights, Pace
from mpromptune.execution.usage import Usage, record
from mpromptune.model.space import Row
from mpromptune.storage.attributes import USAGE

NAME = "0_predictor_instruction"
SIX = PromptSpace({NAME: [f"style {i}" for i in range(6)]})


# Limits.


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_cost": -1},
        {"max_cost": math.nan},
        {"max_seconds": "1 h"},
    ],
)
def test_limits_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    """The message names the value."""
    with pytest.raises(InvalidArgumentError, match=repr(next(iter(bad.values()))).replace(".", "\\.")):
        Limits(**bad)


def test_a_budget_says_which_limit_is_used_up_and_by_how_much() -> None:
    """15 of 10 tokens are used, in two steps."""
    budget = Budget(Limits(max_tokens=10, max_cost=1.0))
    budget.step("bootstrap").add(Usage(prompt_tokens=6))
    assert budget.admits()
    budget.step("search").add(Usage(completion_tokens=9))
    assert not budget.admits()
    assert (budget.reached, str(budget.overspent(None))) == ("max_tokens", "5")
    assert budget.usage.total.tokens == 15


def test_what_is_exceeded_counts_even_if_no_call_was_refused() -> None:
    """A plan that fits its calls to a limit ends before it is reached, and its last calls may exceed it."""
    budget = Budget(Limits(max_tokens=10, max_cost=1.0))
    budget.step("search").add(Usage(prompt_tokens=15, cost=1.5))
    assert budget.reached is None
    assert [budget.overspent(name) for name in ("max_tokens", "max_cost", None)] == [5, 0.5, 5]


def test_time_runs_from_the_beginning() -> None:
    """A limit of a minute is used up after a minute, whatever was done in it."""
    clock = Clock()
    budget = Budget(Limits(max_seconds=60), clock)
    clock.sleep(59)
    assert budget.admits()
    clock.sleep(2)
    assert not budget.admits()
    assert (budget.reached, budget.overspent("max_seconds")) == ("max_seconds", 1.0)


def test_what_is_left_is_reckoned_in_calls() -> None:
    """After 40 of 100 tokens before the search and 30 in ten calls of it, ten more calls can be paid."""
    budget = Budget(Limits(max_tokens=100))
    budget.step("propose").add(Usage(prompt_tokens=40))
    budget.begin_search().add(Usage(prompt_tokens=999))  # in flight: not told yet
    assert budget.calls_left(Usage(prompt_tokens=30), 10) == ("max_tokens", 10)
    assert budget.calls_left(Usage(), 0) is None
    assert budget.calls_left(Usage(), 10) is None  # a cache answers everything


def test_the_tightest_limit_decides() -> None:
    """Money would do for 90 more calls, and half the time is gone after ten, which leaves ten."""
    clock = Clock()
    budget = Budget(Limits(max_cost=1.0, max_seconds=40), clock)
    clock.sleep(5)
    budget.begin_search()
    clock.sleep(15)
    assert budget.calls_left(Usage(cost=0.1), 10) == ("max_seconds", 13)  # 20 s at 1.5 s a call


# The search within limits.


def _space(n: int = 12) -> PromptSpace:
    return PromptSpace({NAME: [f"Style {i}." for i in range(n)]})


def _costly(use: Callable[[int, int], Usage]) -> Callable[[dict[str, int], int], float]:
    """Better with the index of the candidate; ``use(candidate, example)`` says what a call takes."""

    def score(params: dict[str, int], example: int) -> float:
        candidate = params[NAME]
        record(use(candidate, example))
        return float(0.2 + 0.05 * candidate > (example * 0.618) % 1)

    return score


def _search(use: Callable[[int, int], Usage], **arguments: Any) -> Any:
    settings = {"n_examples": 40, "max_calls": 400, "num_threads": 4, "sampler": "random", "seed": 3}
    return search(_space(), _costly(use), **{**settings, **arguments})


def _tokens(candidate: int, example: int) -> Usage:
    return Usage(lm_calls=1, prompt_tokens=8 + example % 5, completion_tokens=1)


def test_every_trial_knows_what_it_used() -> None:
    """The sum over trials is the step's usage, and what the scores counted themselves."""
    counted: list[int] = []

    def use(candidate: int, example: int) -> Usage:
        usage = _tokens(candidate, example)
        counted.append(usage.tokens)
        return usage

    result = _search(use)
    of_trials = [Usage(**json.loads(t.user_attrs[USAGE])) for t in result.study.trials]
    assert sum(usage.tokens for usage in of_trials) == result.usage.total.tokens == sum(counted)
    assert sum(usage.lm_calls for usage in of_trials) == result.usage["search"].lm_calls == len(counted)
    assert result.usage["search"].program_calls == result.calls == len(counted)
    assert result.usage["search"].seconds > 0
    assert (result.stopped_by, str(result.overspent)) == (None, "0.0")


def test_attempts_that_failed_are_paid_for_too() -> None:
    """Each example fails once with a lost connection: twice the calls, for the same scores."""
    failed: set[tuple[int, int]] = set()
    lock = threading.Lock()

    def use(candidate: int, example: int) -> Usage:
        with lock:
            first = (candidate, example) not in failed
            failed.add((candidate, example))
        if first and example < 3:
            record(Usage(lm_calls=1))
            raise ConnectionError("reset")
        return Usage(lm_calls=1)

    result = _search(use, n_examples=10, max_calls=40, retry=RetryPolicy(max_wait=0.001))
    retried = sum(example < 3 for _, example in failed)
    assert result.usage.total.lm_calls == result.calls + retried
    assert result.usage.total.program_calls == result.calls + retried


@pytest.mark.parametrize("limit", ["max_tokens", "max_cost"])
def test_winner_and_baseline_are_confirmed_within_the_limit(limit: str) -> None:
    """A limit that pays for about half of the calls: less exploration, and both fully measured."""
    budget = 2000 if limit == "max_tokens" else 0.2

    def use(candidate: int, example: int) -> Usage:
        return Usage(prompt_tokens=10, cost=0.001)

    result = _search(use, **{limit: budget}, confirm=True)
    used = result.usage.total.tokens if limit == "max_tokens" else result.usage.total.cost
    assert used <= budget
    assert result.calls > 0.8 * 200  # it pays for 200
    assert (result.stopped_by, result.overspent) == (limit, 0.0)
    full = [m.params for m in result.configurations if m.fully]
    assert result.best_params in full
    assert {NAME: 0} in full


def test_a_dear_winner_is_confirmed_too() -> None:
    """What is kept back counts at its own price: the better ones cost five times as much."""

    def use(candidate: int, example: int) -> Usage:
        return Usage(prompt_tokens=50 if candidate >= 6 else 10)

    result = _search(use, max_tokens=6000, confirm=True)
    assert result.usage.total.tokens <= 6000
    assert result.best_params[NAME] >= 6
    assert result.best_params in [m.params for m in result.configurations if m.fully]


def _trials(result: Any) -> list[Any]:
    return [(t.params, t.user_attrs["mpromptune:examples"], t.value) for t in result.study.trials]


@pytest.mark.parametrize("schedule", ["blocks", "mipro"])
def test_the_same_trials_whatever_the_threads(schedule: str) -> None:
    """Limits are reckoned from what was told, so 1 thread and 16 spend alike."""
    options = {"max_tokens": 2500, "schedule": schedule, "batch_size": 4, "minibatch_size": 10}
    one, many = (_search(_tokens, num_threads=n, **options) for n in (1, 16))
    assert _trials(one) == _trials(many)
    assert one.stopped_by == many.stopped_by == "max_tokens"
    assert one.calls < 400


def test_a_limit_that_never_binds_changes_nothing() -> None:
    """The same trials as without it."""
    assert _trials(_search(_tokens, max_tokens=10**9)) == _trials(_search(_tokens))


def test_a_plan_of_minibatches_ends_with_a_full_evaluation() -> None:
    """Cut short, it still evaluates the best of what it has tried."""
    result = _search(_tokens, schedule="mipro", minibatch_size=5, max_tokens=1500)
    assert result.stopped_by == "max_tokens"
    assert result.usage.total.tokens <= 1500
    assert len([m for m in result.configurations if m.fully]) >= 2


def test_calls_that_are_dearer_than_foreseen_stop_the_search() -> None:
    """From example 30 on, all cost a hundred times as much: the limit holds but for what is in flight."""

    def use(candidate: int, example: int) -> Usage:
        return Usage(prompt_tokens=1000 if example >= 30 else 10)

    result = _search(use, max_tokens=4000, block_size=40, batch_size=1)
    assert result.stopped_by == "max_tokens"
    assert 0 <= result.overspent <= 4 * 1000  # four threads
    assert result.usage.total.tokens == 4000 + result.overspent
    assert not any(t.state.name == "RUNNING" for t in result.study.trials)


@pytest.mark.parametrize("max_tokens", [255, 405, 655])
def test_what_a_candidate_failed_on_counts_where_a_limit_is_reached(max_tokens: int) -> None:
    """Its batches are told like all others; left out, only what it could answer would speak for it."""
    asked: Counter[tuple[int, int]] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        asked[params[NAME], example] += 1
        record(Usage(prompt_tokens=10 if len(asked) < 20 else 20))  # dearer than foreseen
        if params[NAME] > 2 and example % 2:
            raise ValueError("cannot parse")
        return 0.5

    result = search(
        SIX,
        score,
        n_examples=40,
        max_calls=300,
        sampler="random",
        max_tokens=max_tokens,
        num_threads=1,
        seed=1,
    )
    assert result.stopped_by == "max_tokens"
    assert result.calls == len(asked)
    assert any(candidate > 2 and example % 2 for candidate, example in asked)


def test_a_call_that_hangs_does_not_hold_up_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says when it comes back at last is too late, and harms nothing."""
    monkeypatch.setattr(loop, "_LAST_CALLS", 0.05)
    release, begun, lock = threading.Event(), [], threading.Lock()

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            begun.append(example)
            hangs = len(begun) == 3
        if hangs:
            release.wait()
        record(Usage(prompt_tokens=10))
        return 0.5

    result = search(SIX, score, n_examples=40, max_calls=300, sampler="random", max_tokens=150, num_threads=2)
    release.set()
    assert (result.stopped_by, result.calls) == ("max_tokens", 15)
    assert all(trial.state.is_finished() for trial in result.study.trials)


def test_nothing_measured_is_an_error_that_says_so() -> None:
    """A limit that is used up before the search begins leaves nothing to return."""
    budget = Budget(Limits(max_tokens=5))
    budget.step("bootstrap").add(Usage(prompt_tokens=5))
    with pytest.raises(SearchStoppedError, match="max_tokens"):
        _search(_tokens, budget=budget)


def test_time_stops_a_search() -> None:
    """A clock that jumps an hour after 50 calls: no further call is begun."""
    clock, calls = Clock(), []

    def use(candidate: int, example: int) -> Usage:
        calls.append(example)
        if len(calls) == 50:
            clock.sleep(3600)
        return Usage(lm_calls=1)

    result = _search(use, num_threads=1, budget=Budget(Limits(max_seconds=60), clock))
    assert len(calls) == 50
    assert result.stopped_by == "max_seconds"
    assert result.calls == 50


# Whom to return when it is cut short.

A, B, C = (0,), (1,), (2,)


def _best(ranked: list[Row], n_examples: int, **scores: dict[int, float]) -> Row:
    """Whom to return of A, the baseline, B and C with these scores."""
    table = ScoreTable(n_examples)
    for name, measured in scores.items():
        table.add({"A": A, "B": B, "C": C}[name], tuple(measured), measured)
    return best_so_far(table, ranked, A)


def test_what_is_fully_measured_comes_first() -> None:
    """B leads but was measured on one of two examples; C was measured on both, as well as the baseline."""
    assert _best([B, C, A], 2, A={0: 0.0, 1: 1.0}, B={0: 1.0}, C={0: 1.0, 1: 1.0}) == C


def test_nothing_worse_than_the_baseline_is_returned() -> None:
    """On what both were measured on; what shares nothing with the baseline is not trusted."""
    assert _best([B, C, A], 4, A={0: 1.0, 1: 0.0}, B={0: 0.0, 2: 1.0}, C={3: 1.0}) == A
    assert _best([B, A], 4, A={0: 1.0, 1: 0.0}, B={0: 1.0, 2: 1.0}) == B
    assert _best([A, B], 4, A={0: 1.0, 1: 0.0}, B={0: 1.0, 2: 1.0}) == A


def test_whoever_leads_is_returned_where_the_baseline_has_no_score_yet() -> None:
    """There is nothing to compare with, and the baseline's own score would be no number."""
    assert _best([B, C], 4, B={0: 1.0}, C={0: 0.0}) == B


# Caps per minute.


def _send(pace: Pace, clock: Clock, n: int, tokens: int = 0) -> list[float]:
    times = []
    for _ in range(n):
        ticket = pace.take(clock.sleep)
        times.append(clock.now)
        pace.settle(ticket, tokens)
    return times


def test_no_minute_holds_more_requests_than_allowed() -> None:
    """Of seven requests with a cap of three, three go in each minute."""
    clock = Clock()
    times = _send(Pace(3, None, clock), clock, 7)
    assert times == pytest.approx([0, 0, 0, 60, 60, 60, 120])


def test_tokens_are_charged_when_they_are_known() -> None:
    """The first takes 80 of 100 per minute: as many are expected of the second, which waits."""
    clock = Clock()
    times = _send(Pace(None, 100, clock), clock, 3, tokens=80)
    assert times == pytest.approx([0, 60, 120])


def test_requests_larger_than_the_cap_go_alone() -> None:
    """150 tokens with a cap of 100: one in each minute, rather than none at all."""
    clock = Clock()
    times = _send(Pace(None, 100, clock), clock, 3, tokens=150)
    assert times == pytest.approx([0, 60, 120])


def test_what_a_cache_answered_is_given_back() -> None:
    """Ten hits use up nothing of a cap of one."""
    clock = Clock()
    pace = Pace(1, 100, clock)
    for _ in range(10):
        pace.settle(pace.take(clock.sleep), 0, requests=0)
    assert clock.now == 0.0
    assert _send(pace, clock, 2) == pytest.approx([0, 60])


def test_waiting_for_leave_can_be_ended() -> None:
    """The sleep raises when the run is over."""

    class Over(BaseException):
        pass

    def stopped(seconds: float) -> None:
        raise Over

    pace = Pace(1, None, Clock())
    pace.take(stopped)
    with pytest.raises(Over):
        pace.take(stopped)


# Equal requests.


class Arrivals:
    """A check that says when so many threads are waiting, and ends their waiting with an error, if any."""

    def __init__(self, wanted: int = 1, error: BaseException | None = None) -> None:
        self.wanted, self.error = wanted, error
        self.there: set[int] = set()
        self.complete = threading.Event()

    def __call__(self) -> None:
        self.there.add(threading.get_ident())
        if len(self.there) == self.wanted:
            self.complete.set()
        if self.error is not None:
            raise self.error


def _first(flights: Flights, **given: Any) -> Any:
    """A request that others wait for; another one, even of the same thread, does not wait for it."""
    first = flights.join("a", Arrivals(), **given)
    assert first is not None
    assert flights.join("b", Arrivals()) is not None
    assert flights.join("a", Arrivals()) is None
    return first


def test_an_equal_request_waits_for_the_first() -> None:
    """It goes on when the first has landed, with its answer."""
    flights, waiting = Flights(patience=60), Arrivals()
    first = _first(flights)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(flights.join, "a", waiting)
        assert waiting.complete.wait(10)
        assert not second.done()
        flights.land(first, succeeded=True)
        assert second.result(10) is first


def test_the_next_in_line_sends_it_when_the_first_has_failed() -> None:
    """One of those that waited takes the lead, and the other waits for that one."""
    flights, waiting = Flights(patience=60), Arrivals(2)
    first = _first(flights)
    with ThreadPoolExecutor(2) as pool:
        waiters = [pool.submit(flights.join, "a", waiting) for _ in range(2)]
        assert waiting.complete.wait(10)
        flights.land(first, succeeded=False)
        done, others = wait(waiters, timeout=10, return_when=FIRST_COMPLETED)
        leader = done.pop().result()
        assert leader is not None
        assert not leader.landed.is_set()
        assert len(others) == 1
        flights.land(leader, succeeded=True)
        assert others.pop().result(10) is not None


def test_nobody_waits_for_a_request_that_hangs_or_was_given_up() -> None:
    """Once it is too old, or its attempt is over its timeout, an equal one is sent beside it."""
    clock, given_up, waiting = Clock(), threading.Event(), Arrivals()
    old, flights = Flights(patience=60, clock=clock), Flights(patience=60)
    _first(old)
    _first(flights, is_given_up=given_up.is_set)
    clock.sleep(61)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(old.join, "a", Arrivals()).result(10) is None
        second = pool.submit(flights.join, "a", waiting)
        assert waiting.complete.wait(10)
        assert not second.done()
        given_up.set()
        assert second.result(10) is None


def test_waiting_for_an_equal_request_can_be_ended() -> None:
    """The check raises when the run is over."""
    flights = Flights(patience=60)
    _first(flights)
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(flights.join, "a", Arrivals(error=KeyboardInterrupt())).result(10)
