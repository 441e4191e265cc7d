"""The student is scored once before all else, which shows that the metric works, and costs nothing more."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import dspy
import pytest
from lms import ScriptedLM, arithmetic_lm, digest
from tasks import FEW_SHOT, LABELLED_ONLY, QEI, SMALL_RUN_CALLS, VAL, ZERO_SHOT, Planner, compiled

from mpromptune import MIPROv2
from mpromptune.execution.interrupts import Stopped, current_stop
from mpromptune.mipro.run import Run, Threads
from mpromptune.storage.attributes import EXAMPLES, SCORES


class Seen(MIPROv2):
    """Remembers how many scores the metric had given when the search began."""

    def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
        self.before = self.metric.calls
        return super()._optimize_prompt_parameters(*args, **kwargs)


class Exact:
    """Exact match; counts what the search asks for (the bootstrap passes a trace), and may fail first.

    Args:
        failures: Per question, the errors that its first calls raise.
    """

    def __init__(self, failures: dict[str, list[Exception]] | None = None) -> None:
        self.calls = 0
        self._failures = failures or {}
        self._lock = threading.Lock()

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        if trace is None:
            with self._lock:
                self.calls += 1
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


@pytest.mark.parametrize("shots", [ZERO_SHOT, LABELLED_ONLY, FEW_SHOT], ids=["zero", "labelled", "few"])
def test_the_first_score_is_one_of_the_search(shots: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials, winner and LM calls are what they are without it."""
    first_lm, plain_lm = _jittery_lm(), _jittery_lm()
    optimizer, best = _compile(Exact(), first_lm, shots)
    monkeypatch.setattr(Run, "score_first", lambda self, program: None)
    unaided, plain = _compile(Exact(), plain_lm, shots)
    assert _measured(best) == _measured(plain)
    assert (best.score, best.dump_state()) == (plain.score, plain.dump_state())
    assert Counter(map(repr, first_lm.calls)) == Counter(map(repr, plain_lm.calls))
    assert optimizer.metric.calls == unaided.metric.calls == SMALL_RUN_CALLS
    assert (optimizer.before, unaided.before) == (1, 0)


def _failing_first(error: Exception, **options: Any) -> Any:
    """The optimizer, the score of the example that fails first, the program, and that without a failure."""
    expected = _compile(Exact())[1]
    first = expected.search_result.study.trials[0].user_attrs[EXAMPLES][0]
    failures = {VAL[first].question: [error]}
    optimizer, best = _compile(Exact(failures), **options)
    baseline = best.search_result.study.trials[0].params
    (scores,) = (m.scores for m in best.search_result.configurations if m.params == baseline)
    return optimizer, scores[first], best, expected


def test_an_outage_is_left_to_the_search() -> None:
    """It tries again, and misses nothing."""
    optimizer, _, best, expected = _failing_first(ConnectionError("down"))
    assert _measured(best) == _measured(expected)
    assert optimizer.metric.calls == SMALL_RUN_CALLS + 1


def test_a_failure_of_the_student_is_paid_once() -> None:
    """What the program itself got wrong is not asked for again, and scores ``failure_score``."""
    optimizer, score, *_ = _failing_first(ValueError("odd"), failure_score=-1.0)
    assert optimizer.before == 1
    assert optimizer.metric.calls == SMALL_RUN_CALLS
    assert score == -1.0


def test_a_program_that_was_replaced_is_measured_itself() -> None:
    """Scores belong to the very program and validation set that they were measured with."""

    class Another(MIPROv2):
        def _optimize_prompt_parameters(self, program: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._optimize_prompt_parameters(program.deepcopy(), *args, **kwargs)

    metric = Exact()
    _compile(metric, optimizer=Another)
    assert metric.calls == SMALL_RUN_CALLS + 1


def test_closing_leaves_behind_what_hangs() -> None:
    """What is under way is told to end, and what is queued never begins."""
    begun, release = threading.Semaphore(0), threading.Event()

    def call() -> bool:
        stop = current_stop()
        begun.release()
        release.wait(10)
        return stop()

    threads = Threads(2)
    futures = [threads.submit(call) for _ in range(2)]
    assert begun.acquire(timeout=10)
    assert begun.acquire(timeout=10)
    late = threads.submit(call)
    threads.close(within=0.1)
    assert not any(future.done() for future in futures)
    release.set()
    assert [future.result(10) for future in futures] == [True, True]
    with pytest.raises(Stopped):
        late.result(10)


def test_calls_keep_the_context() -> None:
    """DSPy's settings of the moment reach them."""
    lm = arithmetic_lm()
    with Threads(4) as threads, dspy.context(lm=lm):
        assert [threads.submit(lambda: dspy.settings.lm).result() for _ in range(8)] == [lm] * 8
