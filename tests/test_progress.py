"""Progress of a search: its numbers, who is told them and when, and that telling changes nothing."""

from __future__ import annotations

import logging
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from clocks import Clock
from embedders import letters
from killed import SPACE, N, Scores

from mpromptune import Limits, SearchResult, qEISampler, search
from mpromptune.engine.evidence import Evidence
from mpromptune.engine.monitor import Monitor
from mpromptune.engine.plan import Task
from mpromptune.engine.scores import ScoreTable
from mpromptune.execution.attempts import Load, RetryPolicy, Throttle
from mpromptune.execution.limits import Budget
from mpromptune.execution.usage import Usage, record
from mpromptune.model.space import Row
from mpromptune.sampling.encoding import encode_prompts
from mpromptune.show.progress import Progress, Speed, Standing, together
from mpromptune.storage.attributes import EXAMPLES, SCORES

ARGUMENTS = {"n_examples": N, "max_calls": 240, "num_threads": 4, "batch_size": 2, "seed": 1}


def run(score: Any = None, **arguments: Any) -> tuple[SearchResult, list[Progress]]:
    """The result, and everything that was told on the way."""
    told: list[Progress] = []
    arguments = {**ARGUMENTS, "sampler": qEISampler(embedder=letters, seed=1), **arguments}
    return search(SPACE, score or Scores(), **{"on_progress": told.append, **arguments}), told


def observed(result: SearchResult) -> list[Any]:
    return [(t.params, t.user_attrs[EXAMPLES], t.user_attrs[SCORES]) for t in result.study.trials]


def test_the_interval_is_that_of_a_normal_posterior() -> None:
    """95 % of a normal lie within 1.96 standard deviations."""
    low, high = Standing(mean=0.5, std=0.1, measured=0.6, examples=10).interval
    assert (low, high) == (pytest.approx(0.304, abs=1e-4), pytest.approx(0.696, abs=1e-4))


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_the_same_trials_whether_anybody_watches_or_not(sampler: str) -> None:
    """Watching fits nothing, draws nothing and asks for nothing."""
    given = qEISampler(embedder=letters, seed=1) if sampler == "qei" else sampler
    watched, told = run(sampler=given)
    alone, nothing = run(sampler=given, on_progress=None)
    assert observed(watched) == observed(alone)
    assert watched.configurations == alone.configurations
    assert len(told) > 2
    assert not nothing


def test_the_last_report_is_the_result() -> None:
    """Score, posterior, calls, batches and trials are those that the search returns."""
    result, told = run()
    last = told[-1]
    best = next(m for m in result.configurations if m.params == result.best_params)
    assert last.best == Standing(best.posterior_mean, best.posterior_std, result.best_score, N)
    assert last.baseline is not None
    assert last.baseline.measured == result.baseline_score
    assert (last.calls, last.trials) == (result.calls, len(result.study.trials))
    assert (last.finished, last.seconds_left) == (True, 0.0)
    assert not any(progress.finished for progress in told[:-1])


def test_counts_grow_and_begin_at_nothing() -> None:
    """The first report comes before any answer; calls and batches only grow."""
    _, told = run(max_calls=120)
    first = told[0]
    assert (first.trials, first.batches, first.best, first.baseline) == (0, 0, None, None)
    for name in ("calls", "batches", "trials", "seconds"):
        values = [getattr(progress, name) for progress in told]
        assert values == sorted(values)
    assert {progress.max_calls for progress in told} == {120}


def test_the_budget_stays_what_it_is_where_a_limit_leaves_less() -> None:
    """Of 120 calls, the tokens are enough for 60."""

    def score(params: dict[str, int], example: int) -> float:
        record(Usage(prompt_tokens=1))
        return 1.0

    result, told = run(score, max_calls=120, max_tokens=60)
    assert result.stopped_by == "max_tokens"
    assert {progress.max_calls for progress in told} == {120}


def standing(mean: float, std: float, examples: int) -> Any:
    """Of a configuration that is judged by its scores alone."""
    return Standing(pytest.approx(mean), pytest.approx(std), pytest.approx(mean), examples)  # type: ignore[arg-type]


def by_hand(told: list[Progress], clock: Clock, **changes: Any) -> Monitor:
    """A search of four examples in which the baseline has two scores, and a rival two and then three."""
    table = ScoreTable(4)
    table.add((0, 0), (0, 1), {0: 1.0, 1: 0.0})
    table.add((1, 2), (0, 1), {0: 1.0, 1: 1.0})
    table.add((1, 2), (2,), {2: 0.0})
    evidence = Evidence(encode_prompts(SPACE, None), table)
    parts: dict[str, Any] = {
        "plan": SimpleNamespace(task=Task(4, 25, (0, 0), 18, 0)),
        "workers": SimpleNamespace(load=Load(3, 4, 4)),
        "trials": SimpleNamespace(told=3, record=()),
        "answered": lambda: 0,
        "budget": Budget(clock=clock),
        **changes,
    }
    return Monitor(on_progress=told.append, evidence=evidence, clock=clock, **parts)


def test_numbers_by_hand_while_there_is_no_surrogate() -> None:
    """The highest mean, 2/3 of three; squared deviations of 1/2 + 2/3 over 3 degrees of freedom."""
    told: list[Progress] = []
    by_hand(told, Clock()).report()
    (progress,) = told
    variance = (0.5 + 2 / 3) / 3
    assert progress.best == standing(2 / 3, (variance / 3) ** 0.5, 3)
    assert progress.baseline == standing(0.5, (variance / 2) ** 0.5, 2)
    assert (progress.calls, progress.max_calls, progress.trials, progress.n_examples) == (5, 25, 3, 4)
    assert progress.load == Load(3, 4, 4)


def test_reports_come_twice_a_second_and_say_how_long_it_takes() -> None:
    """Five calls in ten seconds are two seconds for each of those that are left."""
    told: list[Progress] = []
    clock, answers = Clock(), [0]
    monitor = by_hand(told, clock, answered=lambda: answers[0])
    monitor.report()
    assert told[-1].seconds_left is None
    clock.sleep(0.4)
    monitor.beat()
    assert len(told) == 1
    clock.sleep(9.6)
    answers[0] = 5
    monitor.beat()
    assert (len(told), told[-1].calls, told[-1].seconds) == (2, 10, 10.0)
    assert told[-1].seconds_left == pytest.approx(30.0)  # fifteen are left, at two seconds each


def test_a_round_that_takes_long_is_reported_on() -> None:
    """Its last call ends only when the listener has heard of the others."""
    heard, scores = threading.Event(), Scores()

    def listen(progress: Progress) -> None:
        if progress.batches == 0 and progress.calls == 14 and progress.load.running == 1:
            heard.set()

    def score(params: dict[str, int], example: int) -> float:
        value = scores(params, example)
        if sum(scores.asked.values()) == 15:  # blocks of five: the baseline's, and two others
            assert heard.wait(60)
        return value

    run(score, on_progress=listen, num_threads=1, max_calls=80)
    assert heard.is_set()


def test_a_limit_ends_the_time_that_is_left() -> None:
    """Five calls cost five dollars; with three dollars left the rest is three calls."""
    told: list[Progress] = []
    clock, answers = Clock(), [0]
    budget = Budget(Limits(max_cost=8.0), clock=clock)
    monitor = by_hand(told, clock, budget=budget, answered=lambda: answers[0])
    monitor.evidence.table.usage = Usage(cost=5.0)
    monitor.report()
    clock.sleep(2.0)
    answers[0] = 1
    monitor.report()
    assert told[-1].seconds_left == pytest.approx(4.0)  # two more, as one of the three is back


def test_answers_of_earlier_runs_say_nothing_of_the_time() -> None:
    """While a record is being gone through, and of what it held."""
    told: list[Progress] = []
    clock, answers = Clock(), [0]
    record_, trials = [1], SimpleNamespace(told=3)
    trials.record = record_
    monitor = by_hand(told, clock, trials=trials, answered=lambda: answers[0])
    for answers[0] in (0, 10):
        clock.sleep(1.0)
        monitor.report()
        assert told[-1].seconds_left is None
    record_.clear()
    clock.sleep(3.0)
    answers[0] = 11
    monitor.report()
    assert told[-1].seconds_left == pytest.approx(27.0)  # nine are left


def test_the_best_is_what_the_last_posterior_ranks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and deviation are those of the posterior that was ranked with."""
    expected: list[Any] = []
    rank = Evidence.best_first

    def spy(self: Evidence, rows: list[Row]) -> list[Row]:
        ranked = rank(self, rows)
        if ranked:
            means, deviations = self.posterior([ranked[0], (0, 0)])
            first = int(means.argmax())
            expected.append((float(means[first]), float(deviations[first])))
        return ranked

    monkeypatch.setattr(Evidence, "best_first", spy)
    seen: list[Any] = []

    def compare(progress: Progress) -> None:
        if expected and progress.best is not None and not progress.finished:
            seen.append((progress.best.mean, progress.best.std))
            assert seen[-1] == pytest.approx(expected[-1], abs=1e-5)

    run(on_progress=compare)
    assert len(set(seen)) > 5


def test_an_error_of_the_listener_ends_the_reports_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, with its traceback."""

    def broken(progress: Progress) -> None:
        raise BrokenPipeError("nobody reads")

    with caplog.at_level(logging.ERROR, "mpromptune"):
        result, _ = run(on_progress=broken)
    assert observed(result) == observed(run()[0])
    assert [record.message for record in caplog.records] == [
        "Progress is not reported any more; the search continues."
    ]
    assert caplog.records[0].exc_info


def test_one_listeners_error_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Of several, the one that raises is told nothing more."""
    told: list[int] = []

    def broken(progress: Any) -> None:
        told.append(-1)
        raise ValueError("no")

    both = together(broken, None, told.append)
    assert both is not None
    for number in (1, 2):
        both(number)  # type: ignore[arg-type]
    assert told == [-1, 1, 2]
    assert len(caplog.records) == 1
    assert together(None, None) is None


def test_usage_and_limits_are_told() -> None:
    """Everything that calls have recorded, and what may be used."""
    scores = Scores()

    def paid(params: dict[str, int], example: int) -> float:
        record(Usage(lm_calls=1, cost=0.01))
        return scores(params, example)

    result, told = run(paid, max_cost=100.0)
    assert told[-1].usage.lm_calls == result.calls
    assert told[-1].usage.cost == pytest.approx(0.01 * result.calls)
    assert told[-1].limits == Limits(max_cost=100.0)
    assert told[-1].load.most == 4


def test_a_result_is_pickled_without_its_listener() -> None:
    """What watches may hold what cannot be pickled."""
    lock = threading.Lock()
    result, _ = run(on_progress=lambda progress: lock.locked(), max_calls=80)
    assert pickle.loads(pickle.dumps(result)).best_params == result.best_params


def test_a_resumed_search_counts_what_was_there_and_times_what_is_new(tmp_path: Any) -> None:
    """Recorded answers are calls, and say nothing of the time that new ones take."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first, _ = run(storage=tmp_path / "j", max_calls=120)
    longer, told = run(storage=tmp_path / "j", max_calls=200)
    assert told[-1].calls == longer.calls > first.calls
    assert told[0].seconds_left is None


def test_speed_is_that_of_late() -> None:
    """Ten a second for two minutes, then one a second: a minute of that, and the estimate is of that."""
    clock = Clock()
    speed = Speed(clock)
    assert speed.seconds_for(10) is None
    speed.note(0)
    assert speed.seconds_for(10) is None
    done = 0
    for pace, seconds in ((10, 120), (1, 60)):
        for _ in range(seconds):
            clock.sleep(1.0)
            done += pace
            speed.note(done)
        assert speed.seconds_for(30) == pytest.approx(30 / pace)
    assert speed.seconds_for(0) == 0.0


def test_speed_remembers_little() -> None:
    """However long it takes, and however often it is told."""
    clock = Clock()
    speed = Speed(clock)
    for i in range(50_000):
        clock.sleep(0.7)
        speed.note(i)
    assert len(speed._counts) < 150
    assert speed.seconds_for(10) == pytest.approx(7.0, rel=0.01)


def test_load_says_what_runs_and_what_may() -> None:
    """A refusal halves what may be in flight, and the provider's pause is seen to pass."""
    clock = Clock()
    throttle = Throttle(8, RetryPolicy(), clock.sleep, clock)
    ticket = throttle.enter()
    assert (throttle.load.running, throttle.load.limit, throttle.load.most, throttle.load.pause) == (
        1,
        8,
        8,
        0,
    )
    throttle.refused(ticket, retry_after=20.0)
    clock.sleep(5.0)
    assert (throttle.load.limit, throttle.load.pause) == (4, 15.0)
    throttle.leave()
    assert throttle.load.running == 0
