"""LM requests under watch: what they use is what the LM counted, and equal ones are sent once."""

from __future__ import annotations

import contextvars
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from clocks import Clock
from dspy.clients.cache import Cache, request_cache
from dspy.utils.callback import BaseCallback
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted, Planner

from mpromptune import MIPROv2
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.interrupts import Stopped
from mpromptune.execution.limits import Budget, Limits
from mpromptune.execution.pace import Pace
from mpromptune.execution.usage import Usage, metered
from mpromptune.lms.guard import Guard
from mpromptune.lms.metering import Pricing, measured
from mpromptune.storage.attributes import USAGE


@pytest.fixture(autouse=True)
def _cache_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """DSPy's cache, new for each test and never on disk."""
    cache = Cache(enable_disk_cache=False, enable_memory_cache=True, disk_cache_dir=None)
    monkeypatch.setattr(dspy, "cache", cache)


class CachedLM(ScriptedLM):
    """A scripted LM behind DSPy's cache, whatever the version; ``calls`` are those that got through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = True

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        request = {"prompt": prompt, "messages": messages, **self.kwargs, **kwargs}
        if not request.pop("cache", self.cache):
            return super().forward(prompt, messages)
        ask = super().forward

        @request_cache(cache_arg_name="request")
        def answer(request: dict[str, Any]) -> Any:
            return ask(request["prompt"], request["messages"])

        return answer(request=request)


def cached_arithmetic_lm() -> CachedLM:
    return CachedLM(arithmetic_lm()._answer)


class Held(CachedLM):
    """Answers when it is told to; ``begun`` is released by every call that got through.

    Args:
        error: What the first call raises.
        cached: Whether there is the cache that it says it has.
    """

    def __init__(self, error: Exception | None = None, cached: bool = True) -> None:
        super().__init__(self._held)
        self.begun = threading.Semaphore(0)
        self.answer = threading.Event()
        self.error = error
        self.cached = cached

    def _held(self, field: str, messages: list[dict[str, Any]]) -> str:
        self.begun.release()
        assert self.answer.wait(10)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return "42"

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        return super().forward(prompt, messages, **kwargs if self.cached else {"cache": False})


ASK = dspy.Predict("question -> answer")


def _ask(lm: Any, question: str, **kwargs: Any) -> str:
    with dspy.context(lm=lm):
        return str(ASK(question=question, **kwargs).answer)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def _submit(pool: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> Any:
    return pool.submit(contextvars.copy_context().run, _ask, *args, **kwargs)


# Counting.


def test_an_answer_is_counted_with_its_tokens() -> None:
    """Two requests at 10 + 5 tokens, two dollars per million of the former and four of the latter."""
    guard = Guard(pricing=Pricing({"scripted": (2.0, 4.0)}))
    with guard.watching(), measured() as meter:
        _ask(arithmetic_lm(), "1+1")
        _ask(arithmetic_lm(), "1+2")
    expected = Usage(lm_calls=2, prompt_tokens=20, completion_tokens=10, cost=2 * (10 * 2 + 5 * 4) / 1e6)
    assert meter.total == expected


def test_what_a_cache_answers_is_free() -> None:
    """The second of two equal requests is a hit."""
    lm, guard = cached_arithmetic_lm(), Guard()
    with guard.watching(), measured() as meter:
        _ask(lm, "1+1")
        _ask(lm, "1+1")
    assert meter.total == Usage(lm_calls=1, cache_hits=1, prompt_tokens=10, completion_tokens=5)
    assert len(lm.calls) == 1


def test_a_request_that_failed_was_sent() -> None:
    """It counts as a call, without tokens."""

    def fail(field: str, messages: Any) -> str:
        raise ConnectionError("reset")

    with Guard().watching(), measured() as meter, pytest.raises(ConnectionError):
        _ask(ScriptedLM(fail), "1+1")
    assert meter.total.tokens == 0
    assert meter.total.lm_calls >= 1


reports_usage = pytest.mark.skipif(
    not hasattr(dspy.BaseLM, "_record_response"), reason="DSPy tracks custom LMs only from 3.3 on"
)


@reports_usage
def test_the_users_own_tracker_sees_everything(pool: ThreadPoolExecutor) -> None:
    """`dspy.track_usage` around threads, and within them, adds up."""
    lm = arithmetic_lm()
    with Guard().watching(), measured() as meter, dspy.track_usage() as tracker:
        for future in [_submit(pool, lm, f"{i}+1") for i in range(50)]:
            future.result(10)
        with dspy.track_usage() as inner:
            _ask(lm, "50+1")
    assert inner.get_total_tokens()["scripted"]["prompt_tokens"] == 10
    assert tracker.get_total_tokens()["scripted"]["prompt_tokens"] == 510
    assert meter.total == Usage(lm_calls=51, prompt_tokens=510, completion_tokens=255)


@reports_usage
def test_predictions_still_know_their_usage() -> None:
    """With ``track_usage`` on, DSPy attaches it to what a module returns, as without the guard."""
    with dspy.context(lm=arithmetic_lm(), track_usage=True):
        expected = Adder()(question="1+1").get_lm_usage()
        with Guard().watching(), measured():
            assert Adder()(question="1+1").get_lm_usage() == expected
    assert expected["scripted"]["total_tokens"] == 15


def test_threads_of_dspy_count_for_their_program() -> None:
    """`dspy.Parallel` takes settings along, and no context variables."""
    lm = arithmetic_lm()
    examples = [(ASK, dspy.Example(question=f"{i}+1").with_inputs("question")) for i in range(8)]
    with dspy.context(lm=lm), Guard().watching(), measured() as meter:
        dspy.Parallel(num_threads=4, disable_progress_bar=True)(examples)
    assert meter.total.lm_calls == len(lm.calls) == 8


def test_requests_of_nobody_in_particular_count_for_the_whole() -> None:
    """Without a closer meter, the budget's own."""
    guard = Guard()
    with guard.watching():
        _ask(arithmetic_lm(), "1+1")
    assert guard.budget.meter.total.lm_calls == 1


def test_callbacks_of_the_user_stay() -> None:
    """The guard is one more."""
    seen: list[str] = []

    class Mine(BaseCallback):
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            seen.append(call_id)

    with dspy.context(callbacks=[Mine()]), Guard().watching():
        _ask(arithmetic_lm(), "1+1")
    assert len(seen) == 1


def test_a_guard_within_a_guard_counts_for_both() -> None:
    """A compile in a compile: its requests are the outer one's too, whose end is its end."""
    outer = Guard()
    with outer.watching(), metered(outer.budget.meter):
        inner = Guard()
        with inner.watching():
            _ask(arithmetic_lm(), "1+1")
            outer.stopped.set()
            with pytest.raises(Stopped):
                _ask(arithmetic_lm(), "1+2")
    assert inner.budget.meter.total.lm_calls == outer.budget.meter.total.lm_calls == 1
    assert dspy.settings.usage_tracker is None


# Prices.


@pytest.mark.parametrize(
    ("prices", "dollars"),
    [
        (None, 0.5),  # as the provider reports
        ({"abc": (1e6, 0.0)}, 10.0),
        (lambda model, usage: len(model) + usage["prompt_tokens"], 13.0),
    ],
    ids=["reported", "given", "called"],
)
def test_what_an_answer_costs(prices: Any, dollars: float) -> None:
    """Prices that the user gives come before what the provider sends along."""
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "cost": 0.5}
    assert Pricing(prices).cost(None, "abc", usage) == dollars


def test_a_price_that_fails_loses_no_count(caplog: pytest.LogCaptureFixture) -> None:
    """The request is counted as free, and the error is told once."""

    def fail(model: str, usage: Any) -> float:
        raise KeyError(model)

    with Guard(pricing=Pricing(fail)).watching(), measured() as meter:
        _ask(arithmetic_lm(), "1+1")
        _ask(arithmetic_lm(), "1+2")
    assert (meter.total.lm_calls, meter.total.cost) == (2, 0.0)
    assert len([r for r in caplog.records if "KeyError" in r.getMessage()]) == 1


def test_a_model_without_a_price_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """If money is limited; otherwise nobody asked."""
    with caplog.at_level(logging.WARNING, logger="mpromptune.lms.metering"):
        silent, limited = Pricing(), Pricing(must_know=True)
        for pricing in (silent, limited, limited):
            assert pricing.cost(None, "unheard-of", {"prompt_tokens": 10}) == 0.0
    assert len([r for r in caplog.records if "unheard-of" in r.getMessage()]) == 1


# Equal requests.


def test_equal_requests_under_way_are_sent_once(pool: ThreadPoolExecutor) -> None:
    """Eight threads ask the same: one call, seven hits."""
    lm = Held()
    with Guard().watching(), measured() as meter:
        futures = [_submit(pool, lm, "1+1") for _ in range(8)]
        assert lm.begun.acquire(timeout=10)
        lm.answer.set()
        assert [f.result(10) for f in futures] == ["42"] * 8
    assert len(lm.calls) == 1
    assert (meter.total.lm_calls, meter.total.cache_hits) == (1, 7)


def test_when_the_first_fails_the_next_is_sent(pool: ThreadPoolExecutor) -> None:
    """Who waited for it gets an answer of its own, and the rest from the cache."""
    lm = Held(error=ConnectionError("reset"))
    with Guard().watching(), measured() as meter:
        futures = [_submit(pool, lm, "1+1") for _ in range(4)]
        assert lm.begun.acquire(timeout=10)
        lm.answer.set()
        failed = [f for f in futures if f.exception(10) is not None]
    assert len(failed) <= 1
    sent_again = [messages for messages in lm.calls if messages == lm.calls[0]]
    assert len(sent_again) == 2  # the one that failed, and one for all others
    assert meter.total.lm_calls == len(lm.calls)


@pytest.mark.parametrize("how", ["cache off", "another rollout"])
def test_requests_that_no_cache_answers_do_not_wait(how: str, pool: ThreadPoolExecutor) -> None:
    """Both reach the LM before either is answered."""
    lm = Held()
    config: list[dict[str, Any]] = [{"cache": False}] * 2
    if how == "another rollout":
        config = [{"rollout_id": i, "temperature": 1.0} for i in range(2)]
    with Guard().watching():
        futures = [_submit(pool, lm, "1+1", config=c) for c in config]
        assert all(lm.begun.acquire(timeout=10) for _ in range(2))
        lm.answer.set()
        assert [f.result(10) for f in futures] == ["42"] * 2


def test_an_lm_without_a_cache_is_found_out(pool: ThreadPoolExecutor) -> None:
    """Equal requests wait for each other in vain once; from then on they go out together."""
    lm, guard = Held(cached=False), Guard()

    def pair(question: str) -> list[Any]:
        return [_submit(pool, lm, question) for _ in range(2)]

    with guard.watching():
        while not guard._uncached:  # until two were under way at the same time
            futures = pair("1+1")
            lm.answer.set()
            assert [f.result(10) for f in futures] == ["42"] * 2
            assert all(lm.begun.acquire(timeout=10) for _ in futures)
        lm.answer.clear()
        futures = pair("2+2")
        assert all(lm.begun.acquire(timeout=10) for _ in futures)
        lm.answer.set()
        assert [f.result(10) for f in futures] == ["42"] * 2


def _dspy_lm(begun: threading.Semaphore, answer: threading.Event) -> Any:
    """DSPy's own LM over an engine that answers when it is told to."""
    lm15 = pytest.importorskip("dspy.lm15", reason="engines came with DSPy 3.4")

    class Engine:
        def complete(self, request: Any) -> Any:
            begun.release()
            assert answer.wait(10)
            message = lm15.Message.assistant(
                [lm15.TextPart("[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")]
            )
            usage = lm15.Usage(input_tokens=10, output_tokens=5)
            return lm15.Response(id=None, model="held", message=message, finish_reason="stop", usage=usage)

        def stream(self, request: Any) -> Any:
            return lm15.response_to_events(self.complete(request))

        def close(self) -> None:
            pass

    return dspy.LM("held", engine=Engine())


def test_an_lm_of_dspy_is_counted_and_asked_once(pool: ThreadPoolExecutor) -> None:
    """Eight equal requests under way, and one afterwards: one call of 10 + 5 tokens, and eight hits."""
    begun, answer = threading.Semaphore(0), threading.Event()
    lm = _dspy_lm(begun, answer)
    with Guard(pricing=Pricing({"held": (1.0, 1.0)})).watching(), measured() as meter:
        futures = [_submit(pool, lm, "1+1") for _ in range(8)]
        assert begun.acquire(timeout=10)
        answer.set()
        assert [f.result(10) for f in futures] == ["42"] * 8
        assert _ask(lm, "1+1") == "42"
    expected = Usage(lm_calls=1, cache_hits=8, prompt_tokens=10, completion_tokens=5, cost=15e-6)
    assert meter.total == expected


# Stopping.


def test_a_stopped_program_asks_nothing_more() -> None:
    """The second predictor's request is not sent, and no `except Exception` of a program holds it up."""

    class Stubborn(Planner):
        def forward(self, question: str) -> Any:
            plan = self.plan(question=question).plan
            guard.stopped.set()
            try:
                return self.solve(question=question, plan=plan)
            except Exception:  # noqa: BLE001 - as users do
                return dspy.Prediction(answer="")

    lm, guard = arithmetic_lm(), Guard()
    with dspy.context(lm=lm), guard.watching(), pytest.raises(Stopped):
        Stubborn()(question="1+1")
    assert len(lm.calls) == 1


def test_whoever_waits_is_stopped_too(pool: ThreadPoolExecutor) -> None:
    """A request that waits for an equal one ends with the run, before that one does."""
    lm, guard = Held(), Guard()
    with guard.watching():
        first = _submit(pool, lm, "1+1")
        assert lm.begun.acquire(timeout=10)
        second = _submit(pool, lm, "1+1")
        guard.stopped.set()
        with pytest.raises(Stopped):
            second.result(10)
        lm.answer.set()
        assert first.result(10) == "42"


def test_a_limit_ends_what_it_watches_over() -> None:
    """15 tokens of 20 leave room for another request, 30 do not; unless programs are spared."""
    guard = Guard(Budget(Limits(max_tokens=20)))
    lm = arithmetic_lm()
    with guard.watching():
        _ask(lm, "1+1")
        _ask(lm, "1+2")
        with pytest.raises(Stopped):
            _ask(lm, "1+3")
        guard.spares = True
        _ask(lm, "1+4")
    assert guard.budget.meter.total.tokens == 45


# Caps per minute.


def test_requests_are_paced_and_hits_are_not() -> None:
    """With one request a minute: hits in between do not matter, and the second request waits a minute."""
    clock, guard = Clock(), Guard()
    guard.pace = Pace(1, None, clock)
    guard._sleep = clock.sleep  # type: ignore[method-assign]
    lm = cached_arithmetic_lm()
    with guard.watching():
        _ask(lm, "1+1")
        clock.now = 60.0
        for _ in range(5):
            _ask(lm, "1+1")
        assert clock.now == 60.0
        _ask(lm, "1+2")
        assert clock.now == 60.0
        _ask(lm, "1+3")
    assert clock.now == pytest.approx(120.0)
    assert len(lm.calls) == 3


# Whole compiles.


def _compile(lm: Any, program: Any = None, shots: Any = FEW_SHOT, threads: int = 4, **options: Any) -> Any:
    run = {**SMALL_RUN, "sampler": "qei", "embedder": hashed, "block_size": 4, "batch_size": 2, **options}
    with dspy.context(lm=lm):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=threads, **shots)
        return optimizer.compile(program or Planner(), trainset=TRAIN, valset=VAL, **run)


def test_the_ledger_is_what_the_lm_counted() -> None:
    """Calls, tokens and dollars, over all steps; and those of the search over all trials."""
    lm = arithmetic_lm()
    best = _compile(lm, shots=ZERO_SHOT, prices={"scripted": (1.0, 2.0)})
    usage = best.search_result.usage
    assert set(usage) == {"bootstrap", "propose", "search"}
    assert usage.total.lm_calls == len(lm.calls)
    assert (usage.total.prompt_tokens, usage.total.completion_tokens) == (
        10 * len(lm.calls),
        5 * len(lm.calls),
    )
    assert usage.total.cost == pytest.approx(len(lm.calls) * 20e-6)
    of_trials = [Usage(**json.loads(t.user_attrs[USAGE])) for t in best.search_result.study.trials]
    assert sum(u.lm_calls for u in of_trials) == usage["search"].lm_calls == 2 * best.search_result.calls
    assert sum(u.program_calls for u in of_trials) == usage["search"].program_calls
    assert best.prompt_model_total_calls == usage["propose"].lm_calls > 0


@reports_usage
def test_a_tracker_of_the_users_sees_a_whole_compile() -> None:
    """`dspy.track_usage` around it has what all threads of all steps have used."""
    lm = arithmetic_lm()
    with dspy.track_usage() as tracker:
        best = _compile(lm)
    tokens = tracker.get_total_tokens()["scripted"]
    assert tokens["prompt_tokens"] == 10 * len(lm.calls)
    assert tokens["total_tokens"] == best.search_result.usage.total.tokens


def test_a_limit_in_dollars_counts_all_steps() -> None:
    """At two cents a request, half of what a compile costs: what was in flight exceeds it at most."""
    prices = {"scripted": (1e3, 2e3)}
    free = _compile(arithmetic_lm(), prices=prices, max_calls=120).search_result.usage
    limit = free.total.cost - free["search"].cost / 2
    result = _compile(lm := arithmetic_lm(), prices=prices, max_calls=120, max_cost=limit).search_result
    assert (
        free.total.cost - free["search"].cost < result.usage.total.cost == pytest.approx(0.02 * len(lm.calls))
    )
    assert result.usage.total.cost <= limit + 4 * 0.02
    assert result.stopped_by == "max_cost"
    assert result.overspent == pytest.approx(max(0.0, result.usage.total.cost - limit))


def test_concurrent_compiles_cost_what_serial_ones_do() -> None:
    """With a cache, a program of two predictors takes as many LM calls with 16 threads as with one."""
    one, many = cached_arithmetic_lm(), cached_arithmetic_lm()
    first = _compile(one, threads=1)
    dspy.cache.reset_memory_cache()
    second = _compile(many, threads=16)
    assert len(one.calls) == len(many.calls)
    assert first.search_result.usage.total.lm_calls == len(one.calls)
    assert second.search_result.usage.total.lm_calls == len(many.calls)
    assert first.search_result.usage.total.cache_hits > 0


def test_a_limit_covers_the_steps_before_the_search() -> None:
    """A hundred tokens do not get through them: the error says where they went, and few more were used."""
    lm = arithmetic_lm()
    with pytest.raises(SearchStoppedError, match="max_tokens=100") as caught:
        _compile(lm, max_tokens=100)
    assert "before the search" in str(caught.value)
    assert isinstance(caught.value.program, dspy.Module)  # the student
    assert 15 * len(lm.calls) <= 100 + 15 * 4 + 15  # four threads, and what the limit let begin


def test_a_limit_ends_a_compile_with_its_best_program() -> None:
    """The budget of a compile, less a tenth: winner and baseline are fully measured all the same."""
    free = _compile(arithmetic_lm(), shots=ZERO_SHOT, confirm=True)
    limit = int(0.9 * free.search_result.usage.total.tokens)
    best = _compile(arithmetic_lm(), shots=ZERO_SHOT, max_tokens=limit, confirm=True)
    assert best.search_result.stopped_by == "max_tokens"
    assert best.search_result.usage.total.tokens <= limit
    assert best.search_result.best_params in [m.params for m in best.search_result.configurations if m.fully]


def test_limits_do_not_make_trials_depend_on_threads() -> None:
    """One thread and sixteen, half of the tokens that a compile would take: the same trials and winner."""
    free = _compile(arithmetic_lm(), shots=ZERO_SHOT, max_calls=120)
    steps = free.search_result.usage["bootstrap"] + free.search_result.usage["propose"]
    limit = steps.tokens + free.search_result.usage["search"].tokens // 2

    def run(threads: int) -> Any:
        lm = arithmetic_lm()
        result = _compile(lm, shots=ZERO_SHOT, threads=threads, max_calls=120, max_tokens=limit).search_result
        assert result.usage.total.tokens <= limit
        return [(t.params, t.value) for t in result.study.trials], result.best_params, result.stopped_by

    assert run(1) == run(16)
    assert run(4)[2] == "max_tokens"


def test_after_a_compile_nothing_is_watched() -> None:
    """The callback and the trackers are gone with it."""
    _compile(arithmetic_lm(), shots=ZERO_SHOT)
    assert not [c for c in dspy.settings.callbacks if isinstance(c, Guard)]
    assert dspy.settings.usage_tracker is None
