"""Compiles whose programs run in other processes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
import tasks
from clocks import Clock
from faults import RUN, BadKey, RateLimited, sdk_error
from lms import arithmetic_lm
from remote_lms import WrittenLM
from remote_scores import Distant, write, written
from tasks import VAL, Planner

from mpromptune.errors import SearchStoppedError, TravelError, WorkerLostError
from mpromptune.execution.pace import Pace
from mpromptune.execution.usage import Usage, record
from mpromptune.execution.worker import pack
from mpromptune.lms.guard import Guard
from mpromptune.lms.metering import Pricing
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace
from mpromptune.mipro.remote import _Paced, _RemoteRunner, dspy_settings

CALLS = 60


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def compiled(lm: Any, metric: Callable[..., Any] = exact, program: Any = None, **options: Any) -> Any:
    """The best program of a small compile."""
    run = {**RUN, "max_calls": CALLS, **options}
    return tasks.compiled(program or Planner(), lm=lm, metric=metric, **run)


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compile in threads."""
    return compiled(WrittenLM(tmp_path_factory.mktemp("home") / "log"))


def trials_of(program: Any) -> list[Any]:
    return [(t.number, t.params, t.value) for t in program.search_result.study.trials]


def same_prompts(a: Any, b: Any) -> bool:
    return [(p.signature.instructions, p.demos) for p in a.predictors()] == [
        (p.signature.instructions, p.demos) for p in b.predictors()
    ]


def test_a_killed_process_loses_no_trial_of_a_compile(at_home: Any, tmp_path: Path, forks: Any) -> None:
    """Its calls are made again; the requests that died with it are all that the ledger lacks."""
    lm = WrittenLM(tmp_path / "log", dies=150)
    best = compiled(lm, executor=lambda: ProcessPoolExecutor(2, mp_context=forks))
    assert (tmp_path / "log.killed").exists()
    assert trials_of(best) == trials_of(at_home)
    assert same_prompts(best, at_home)
    answered, counted = written(tmp_path / "log", "end").total(), best.search_result.usage.total.lm_calls
    assert 0 <= answered - counted <= 2 * 4  # the second of two requests, of so many calls under way


def test_dask_runs_programs(at_home: Any, tmp_path: Path) -> None:
    """Same trials and winner as in threads; LM calls and tokens are those that the LM has written down."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=4, processes=True, dashboard_address=":0", memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        best = compiled(WrittenLM(tmp_path / "log"), executor=client.get_executor())
    assert trials_of(best) == trials_of(at_home)
    assert same_prompts(best, at_home)
    answered, used = written(tmp_path / "log", "end"), best.search_result.usage
    assert answered["away"] > 0
    assert used.total.lm_calls == answered.total()
    assert used.total.prompt_tokens == 10 * answered.total()
    # Two predictors.
    assert used["search"].lm_calls == 2 * best.search_result.calls
    assert at_home.search_result.usage["search"].lm_calls == used["search"].lm_calls


def test_threads_take_what_cannot_travel(at_home: Any) -> None:
    """In a ThreadPoolExecutor an LM with a lock is as good as any, and the pool is left open."""
    with ThreadPoolExecutor(4) as pool:
        best = compiled(arithmetic_lm(), executor=pool)
        assert pool.submit(abs, -3).result(60) == 3
    assert trials_of(best) == trials_of(at_home)


class Locked:
    """A metric, a setting, or part of a program that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, *args: Any) -> bool:
        return True


def locked_program() -> Planner:
    program = Planner()
    program.tool = Locked()
    return program


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"metric": Locked()}, "The metric cannot be sent"),
        ({"program": locked_program}, "The program cannot be sent"),
        ({"lm": arithmetic_lm}, "DSPy's setting 'lm' cannot be sent"),
        ({"adapter": Locked()}, "DSPy's setting 'adapter' cannot be sent"),
        ({"prices": Locked()}, "The option 'prices' cannot be sent"),
    ],
)
def test_what_cannot_travel_is_named_before_any_lm_call(
    given: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """The error says which of all that a compile is made of, and nothing has been asked."""
    lm = given.pop("lm")() if "lm" in given else WrittenLM(tmp_path / "log")
    if "program" in given:
        given["program"] = given["program"]()
    with dspy.context(adapter=given.pop("adapter", None)), pytest.raises(TravelError, match=named):
        compiled(lm, executor=Distant(), **given)
    assert not written(tmp_path / "log", "start")
    assert not getattr(lm, "calls", [])


def test_a_dry_run_starts_no_executor(tmp_path: Path) -> None:
    """An estimate needs no workers."""

    def make() -> Executor:
        raise AssertionError

    assert compiled(WrittenLM(tmp_path / "log"), executor=make, dry_run=True) is not None


class Failing(WrittenLM):
    """Raises in the search, once or always."""

    def __init__(self, log: Path, error: Exception, times: int) -> None:
        super().__init__(log)
        self.error, self.times = error, times

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        here = threading.current_thread().name.startswith("Distant")
        if here and written(self.log, "failed").total() < self.times:
            write(self.log, "failed away")
            raise self.error
        return super().forward(prompt, messages, **kwargs)


def test_rate_limits_in_a_worker_slow_the_search_down(at_home: Any, tmp_path: Path) -> None:
    """A refusal there is a refusal here: the call is made again, whatever max_retries says."""
    lm = Failing(tmp_path / "log", RateLimited("slow down"), times=2)
    best = compiled(lm, executor=Distant(), max_retries=0)
    assert written(tmp_path / "log", "failed").total() >= 2  # two workers may count at the same time
    assert trials_of(best) == trials_of(at_home)


def test_caps_change_no_trial(at_home: Any, tmp_path: Path) -> None:
    """With leave for every call, taken before it is sent, a search is what it is without."""
    best = compiled(WrittenLM(tmp_path / "log"), executor=Distant(), max_requests_per_minute=100_000)
    assert trials_of(best) == trials_of(at_home)
    assert best.search_result.usage.total.lm_calls == written(tmp_path / "log", "end").total()


def test_a_wrong_key_in_a_worker_stops_the_search(tmp_path: Path) -> None:
    """With what was measured, and the student."""
    lm = Failing(tmp_path / "log", BadKey("no"), times=1000)
    with pytest.raises(SearchStoppedError) as caught:
        compiled(lm, executor=Distant())
    assert isinstance(caught.value.__cause__, BadKey)
    assert caught.value.program is not None


TooMuch = sdk_error("BadRequestError", "LMInvalidRequestError")


def test_a_failing_candidate_is_logged_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What scores failure_score in a worker leaves its line in the log of this process."""
    lm = Failing(tmp_path / "log", TooMuch("gibberish"), times=1)
    compiled(lm, executor=Distant())
    failed = written(tmp_path / "log", "failed").total()  # two workers may count at the same time
    logged = sum("failed with" in r.message and "gibberish" in r.message for r in caplog.records)
    assert logged == failed >= 1


def _run() -> _RemoteRunner:
    return _RemoteRunner(ProgramRunner(ProgramSpace(Planner(), {}), VAL, exact), Pricing(), dspy_settings())


def test_a_worker_has_the_cache_of_where_its_work_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DSPy's disk cache is off, or elsewhere, it is so in the workers."""
    with dspy.context(lm=WrittenLM(tmp_path / "log")):
        monkeypatch.setattr(dspy, "cache", dspy.clients.Cache(False, True, str(tmp_path)))
        packed = pack(_run(), {})
        monkeypatch.setattr(dspy, "cache", dspy.clients.Cache(True, True, str(tmp_path / "other")))
        pickle.loads(packed)
    assert (dspy.cache.enable_disk_cache, dspy.cache.disk_cache_dir) == (False, str(tmp_path))


def test_the_history_of_an_lm_stays_here(tmp_path: Path) -> None:
    """What an LM has been asked before does not travel with it, and is not lost either."""
    lm = WrittenLM(tmp_path / "log")
    lm.history.append({"prompt": "x" * 1000})
    with dspy.context(lm=lm):
        run = _run()
    assert b"x" * 1000 not in pack(run, {})
    assert len(lm.history) == 1


class Asking:
    """A score that takes a second on the clock for each of its requests."""

    def __init__(self, clock: Clock, requests: list[int]) -> None:
        self.clock, self.requests, self.sent = clock, iter(requests), []

    def __call__(self, params: dict[str, int], example: int) -> float:
        number = next(self.requests)
        if number < 0:
            raise WorkerLostError("killed")
        for _ in range(number):
            self.sent.append(self.clock.now)
            self.clock.sleep(1.0)
        record(Usage(lm_calls=number, prompt_tokens=100 * number))
        return 1.0


def paced(clock: Clock, score: Asking, expected: int) -> _Paced:
    pace = Pace(10, None, clock)
    guard = Guard(pace=pace)
    paced = _Paced(score, guard, pace, expected)
    paced._sleep = clock.sleep  # type: ignore[method-assign]
    return paced


def most_in_a_minute(times: list[float]) -> int:
    return max(sum(t <= other < t + 60 for other in times) for t in times)


@pytest.mark.parametrize("requests", [[2] * 40, [1] * 60, [0, 2, 0, 1] * 15, [3, 1, 2] * 10, [10, 1] * 5])
def test_caps_per_minute_hold_in_workers(requests: list[int]) -> None:
    """In no window of sixty seconds are more requests sent than allowed, however late in a call."""
    clock = Clock()
    score = Asking(clock, requests)
    call = paced(clock, score, max(requests))
    for _ in requests:
        call({}, 0)
    assert len(score.sent) == sum(requests)
    assert most_in_a_minute(score.sent) <= 10


def test_what_a_lost_worker_has_sent_counts_as_much_as_it_may_have_been() -> None:
    """Ten calls of at most one request that died fill the minute; the next one waits for its end."""
    clock = Clock()
    score = Asking(clock, [-1] * 10 + [1])
    call = paced(clock, score, 1)
    for _ in range(10):
        with pytest.raises(WorkerLostError):
            call({}, 0)
    assert clock.now == 0
    call({}, 0)
    assert score.sent[0] >= 60
