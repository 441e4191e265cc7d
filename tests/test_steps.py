"""The steps before the search use the threads they leave idle, and change nothing by it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import dspy
import pytest
from lms import ScriptedLM, arithmetic_lm, digest
from tasks import FEW_SHOT, QEI, SMALL_RUN_CALLS, TRAIN, VAL, ZERO_SHOT, Planner, compiled

from mpromptune import MIPROv2
from mpromptune.execution.interrupts import Stopped, current_stop
from mpromptune.lms.threads import Threads
from mpromptune.mipro.run import Run
from mpromptune.storage.attributes import EXAMPLES, SCORES

PATIENCE = 30.0  # seconds that a busy machine may need


class Seen(MIPROv2):
    """Remembers how many scores the metric had given when the search began, and on what."""

    def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
        self.before, self.asked = self.metric.calls, set(self.metric.asked)
        return super()._optimize_prompt_parameters(*args, **kwargs)


class Exact:
    """Exact match; counts what the search asks for (the bootstrap passes a trace), and may fail first.

    Args:
        failures: Per question, the errors that its first calls raise.
    """

    def __init__(self, failures: dict[str, list[Exception]] | None = None) -> None:
        self.calls = 0
        self.asked: Counter[str] = Counter()
        self._failures = failures or {}
        self._lock = threading.Lock()

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        if trace is None:
            with self._lock:
                self.calls += 1
                self.asked[example.question] += 1
                if errors := self._failures.get(example.question):
                    raise errors.pop()
        return bool(example.answer == prediction.answer)


def _jittery_lm() -> ScriptedLM:
    return arithmetic_lm(latency=lambda messages: digest(messages, "latency") % 8 / 1000)


def _compile(metric: Any, lm: ScriptedLM | None = None, shots: Any = FEW_SHOT, **options: Any) -> Any:
    """The optimizer, and the program that it returned."""
    seen: list[Any] = []
    cls = options.pop("optimizer", Seen)
    options = {**QEI, "batch_size": 4, "confirm": True, **options}

    def optimizer(**settings: Any) -> Any:
        seen.append(cls(**settings))
        return seen[0]

    init = {"num_threads": 8, **shots}
    lm = lm or _jittery_lm()
    best = compiled(Planner(), lm=lm, metric=metric, init=init, optimizer=optimizer, **options)
    return seen[0], best


def _measured(best: Any) -> list[Any]:
    """Every trial: what was tried, on which examples, with which scores."""
    trials = best.search_result.study.trials
    return [(t.params, t.user_attrs[EXAMPLES], t.user_attrs[SCORES], t.value) for t in trials]


@pytest.mark.parametrize("shots", [ZERO_SHOT, FEW_SHOT], ids=["zero", "few"])
def test_same_search_for_the_same_calls(shots: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the student scored ahead, trials, winner and LM calls are what they are without."""
    ahead_lm, plain_lm = _jittery_lm(), _jittery_lm()
    optimizer, ahead = _compile(Exact(), ahead_lm, shots)
    monkeypatch.setattr(Run, "want_scores", lambda self, *_: None)
    unaided, plain = _compile(Exact(), plain_lm, shots)
    assert _measured(ahead) == _measured(plain)
    assert (ahead.score, ahead.dump_state()) == (plain.score, plain.dump_state())
    assert Counter(map(repr, ahead_lm.calls)) == Counter(map(repr, plain_lm.calls))
    assert optimizer.metric.calls == unaided.metric.calls == SMALL_RUN_CALLS
    assert optimizer.before > unaided.before == 0


@pytest.mark.parametrize("confirm", ["auto", False])
def test_nothing_is_scored_ahead_that_may_not_be_needed(confirm: Any) -> None:
    """Without ``confirm=True``, only the student's first block, which the search begins with, is."""
    optimizer, _ = _compile(Exact(), confirm=confirm)
    assert 0 < optimizer.before <= 5


def test_examples_of_the_bootstrap_are_not_asked_for_ahead() -> None:
    """At the same time, a cache could not answer one of two equal requests."""
    optimizer, _ = _compile(Exact(), shots=ZERO_SHOT, valset=[*TRAIN, *VAL])
    assert optimizer.asked
    assert not optimizer.asked & {example.question for example in TRAIN}


def test_an_outage_is_left_to_the_search() -> None:
    """It ends the scoring ahead; the search tries again, and misses nothing."""
    question = VAL[0].question
    expected = _compile(Exact())[1]
    optimizer, best = _compile(Exact({question: [ConnectionError("down")]}))
    assert _measured(best) == _measured(expected)
    assert optimizer.metric.calls == SMALL_RUN_CALLS + 1


def test_a_failure_of_the_student_is_paid_once() -> None:
    """What the program itself got wrong is not asked for again, and scores ``failure_score``."""
    failures = {example.question: [ValueError("odd")] for example in VAL[::6]}
    optimizer, best = _compile(Exact(failures), failure_score=-1.0)
    assert optimizer.metric.calls == SMALL_RUN_CALLS
    baseline = best.search_result.study.trials[0].params
    scores = next(m.scores for m in best.search_result.configurations if m.params == baseline)
    assert [example for example, score in scores.items() if score == -1.0] == [0, 6]


def test_a_student_that_never_works_is_given_up() -> None:
    """No more scores are asked for ahead than errors are allowed and threads are there."""
    failures = {example.question: [ValueError("odd")] for example in VAL}
    optimizer, _ = _compile(Exact(failures), shots={**FEW_SHOT, "num_threads": 3, "max_errors": 2})
    assert 2 <= optimizer.before <= 2 + 3


def test_a_program_that_was_replaced_is_measured_itself() -> None:
    """Scores belong to the very program and validation set that they were measured with."""

    class Another(MIPROv2):
        def _optimize_prompt_parameters(self, program: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._optimize_prompt_parameters(program.deepcopy(), *args, **kwargs)

    metric = Exact()
    _compile(metric, optimizer=Another)
    assert SMALL_RUN_CALLS < metric.calls <= SMALL_RUN_CALLS + len(VAL)


def test_fillers_take_the_threads_that_are_left() -> None:
    """Never more calls at a time than threads, and what is submitted goes before what only fills."""
    order: list[str] = []
    running, most = Counter[str](), Counter[str]()
    lock = threading.Lock()
    all_submitted, looked = threading.Event(), threading.Event()

    def call(name: str, until: threading.Event) -> None:
        with lock:
            order.append(name)
            running["all"] += 1
            most["all"] = max(most["all"], running["all"])
        until.wait(PATIENCE)
        with lock:
            running["all"] -= 1

    def wait_for_fillers(n: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while order.count("filler") < n and time.monotonic() < deadline:
            time.sleep(0.001)

    with Threads(3) as threads:
        # The first three hold their threads until all calls are submitted, the others until we have looked.
        threads.fill(partial(call, "filler", all_submitted if i < 3 else looked) for i in range(12))
        wait_for_fillers(3)
        futures = [threads.submit(call, "submitted", all_submitted) for _ in range(6)]
        all_submitted.set()
        for future in futures:
            future.result()
        at_most = order.count("filler")
        looked.set()
        wait_for_fillers(12)
    assert order.count("filler") == 12
    assert order[:3] == ["filler"] * 3
    assert order[3:9] == ["submitted"] * 6
    assert at_most <= 3 + 3
    assert most["all"] == 3


def test_closing_takes_no_further_filler() -> None:
    """Of a stream of calls, only those are taken that are begun."""
    taken: list[int] = []

    def calls() -> Iterator[Any]:
        for number in range(1000):
            taken.append(number)
            yield lambda: time.sleep(0.01)

    threads = Threads(2)
    threads.fill(calls())
    time.sleep(0.05)
    threads.close()
    done = len(taken)
    assert 2 <= done < 30
    time.sleep(0.05)
    assert len(taken) == done


def test_what_is_under_way_comes_to_its_end() -> None:
    """A program of several predictors makes all of its calls; one that hangs is left behind, and told."""
    begun, finishing, release = threading.Semaphore(0), threading.Event(), threading.Event()

    def call(hangs: bool) -> bool:
        stop = current_stop()
        begun.release()
        (release if hangs else finishing).wait(10)
        return stop()

    threads = Threads(2)
    futures = [threads.submit(call, hangs) for hangs in (False, True)]
    assert begun.acquire(timeout=10)
    assert begun.acquire(timeout=10)
    late = threads.submit(call, False)
    threading.Timer(0.1, finishing.set).start()
    threads.finish(within=0.5)
    assert futures[0].result(10) is False
    assert not futures[1].done()
    release.set()
    assert futures[1].result(10) is True
    with pytest.raises(Stopped):
        late.result(10)


def test_fillers_keep_the_context() -> None:
    """DSPy's settings of the moment reach them, each in a context of its own."""
    seen: list[Any] = []
    lm = arithmetic_lm()
    with Threads(4) as threads:
        with dspy.context(lm=lm):
            threads.fill((lambda: seen.append(dspy.settings.lm)) for _ in range(8))
        time.sleep(0.1)
    assert seen == [lm] * 8
