"""Demo sets built concurrently are those that DSPy builds one call after the other."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from typing import Any

import dspy
import pytest
from dspy.teleprompt.utils import create_n_fewshot_demo_sets
from lms import ScriptedLM, digest
from tasks import Adder, Planner, additions

from mpromptune.execution.interrupts import Stopped
from mpromptune.mipro.bootstrap import prepared_demo_sets
from mpromptune.mipro.run import Threads

TRAIN = additions(20)


class Chain(dspy.Module):
    """Three predictors, of which one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = dspy.Predict("question -> plan")
        self.check = dspy.Predict("question, plan -> check")
        self.solve = dspy.Predict("question, check -> answer")

    def forward(self, question: str) -> Any:
        plan = self.plan(question=question).plan
        check = self.check(question=question, plan=plan).check
        return self.solve(question=question, check=self.check(question=question, plan=check).check)


class Fragile(dspy.Module):
    """Raises on every third example."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        if int(question.split("+")[0]) % 3 == 0:
            raise ValueError(question)
        return self.solve(question=question)


def _lm(shuffled: bool = False) -> ScriptedLM:
    """Its answers depend on the whole prompt, demos included; so does its latency, if shuffled."""

    def latency(messages: list[Any]) -> float:
        return digest(messages, "latency") % 8 / 1000 if shuffled else 0.0

    return ScriptedLM(lambda field, messages: f"{field} {digest(messages) % 1000}", latency)


def _luck(share: float) -> Any:
    """A metric that accepts a share of the predictions."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return digest(example.question, prediction.answer) % 100 < 100 * share

    return metric


GIVEN = {
    "student": Adder(),
    "teacher": None,
    "trainset": TRAIN,
    "num_candidate_sets": 6,
    "max_labeled_demos": 2,
    "max_bootstrapped_demos": 3,
    "metric": None,
    "metric_threshold": None,
    "max_errors": 100,
    "teacher_settings": {},
}


def _prepared(pool: Threads, **given: Any) -> Any:
    return prepared_demo_sets(random.Random(0), pool, **{**GIVEN, **given})


def _compare(
    program: dspy.Module, metric: Any, threads: int = 8, lms: Any = (_lm, _lm), **settings: Any
) -> tuple[list[Any], ...]:
    """Demos (or the error), generator state and LM calls: of DSPy's serial loop and of ours."""
    given = {**GIVEN, "student": program, "metric": metric, **settings}

    def concurrent(rng: random.Random) -> Any:
        with Threads(threads) as pool:
            return prepared_demo_sets(rng, pool, **given)()

    return tuple(
        _outcome(build, make())
        for make, build in zip(
            lms, (lambda rng: create_n_fewshot_demo_sets(**given, rng=rng), concurrent), strict=True
        )
    )


def _outcome(build: Any, lm: ScriptedLM) -> list[Any]:
    rng = random.Random(7)
    result: Any = None
    with dspy.context(lm=lm):
        try:
            result = build(rng)
        except Exception as error:  # noqa: BLE001 - whatever is raised has to be the same
            result = repr(error)
    return [result, rng.getstate(), Counter(map(repr, lm.calls))]


@pytest.mark.parametrize(
    ("program_class", "share"), [(Adder, 0.3), (Planner, 0.3), (Chain, 0.0), (Chain, 0.3), (Chain, 1.0)]
)
@pytest.mark.parametrize("shots", [(2, 3), (0, 3), (4, 1)], ids=["few", "zero", "labelled more"])
def test_equals_the_serial_bootstrap(program_class: Any, share: float, shots: tuple[int, int]) -> None:
    """Same demos in the same order, same draws, the very same LM calls, however many examples fail."""
    labelled, bootstrapped = shots
    serial, ours = _compare(
        program_class(), _luck(share), max_labeled_demos=labelled, max_bootstrapped_demos=bootstrapped
    )
    assert ours == serial


@pytest.mark.parametrize("threads", [1, 8, 32])
def test_any_number_of_threads_and_any_latency(threads: int) -> None:
    """Which call comes back first changes nothing."""
    lms = (_lm, lambda: _lm(shuffled=True))
    serial, ours = _compare(Planner(), _luck(0.4), threads, lms)
    assert ours == serial


@pytest.mark.parametrize("sets", [1, 2, 3, 9])
def test_any_number_of_sets(sets: int) -> None:
    """DSPy's first three sets are special ones, and any of them may be the last."""
    serial, ours = _compare(Adder(), _luck(0.6), num_candidate_sets=sets)
    assert ours == serial


def test_no_metric_and_a_threshold() -> None:
    """Without a metric every example is taken; a threshold turns numbers into decisions."""

    def number(example: Any, prediction: Any, trace: Any = None) -> float:
        return digest(example.question, prediction.answer) % 10 / 10

    for metric, threshold in ((None, None), (number, 0.5)):
        serial, ours = _compare(Adder(), metric, metric_threshold=threshold)
        assert ours == serial


def test_own_teacher_and_teacher_settings() -> None:
    """A compiled teacher with demos of its own, run by another LM."""
    teacher = Adder()
    teacher.solve.demos = [dspy.Example(question="1+1", answer="2"), *TRAIN[:2]]
    teacher._compiled = True
    other = _lm()
    serial, ours = _compare(Adder(), _luck(0.5), teacher=teacher, teacher_settings={"lm": other})
    assert ours == serial
    assert not serial[2]  # the student's LM is not asked
    half = len(other.calls) // 2
    first, second = (Counter(map(repr, calls)) for calls in (other.calls[:half], other.calls[half:]))
    assert first == second


@pytest.mark.parametrize("max_errors", [1, 2, 4, 100])
def test_errors_are_counted_in_order(max_errors: int) -> None:
    """The same error ends the bootstrap as in DSPy; below the limit an error is a failed example."""
    serial, ours = _compare(Fragile(), _luck(0.5), max_errors=max_errors, max_labeled_demos=0)
    assert ours[0] == serial[0]
    assert not serial[2] - ours[2]
    assert isinstance(serial[0], str) == (max_errors < 100)


def test_teacher_that_fails_on_its_own_demo() -> None:
    """DSPy's teacher loses that demo for good, and so does ours."""
    serial, ours = _compare(Fragile(), _luck(0.3), max_labeled_demos=8, lms=(_lm, lambda: _lm(shuffled=True)))
    assert ours == serial


def test_metric_whose_verdict_has_no_truth_value() -> None:
    """What DSPy does not count as an example's error ends the bootstrap here too."""

    class Neither:
        def __bool__(self) -> bool:
            raise TypeError("neither true nor false")

    serial, ours = _compare(Adder(), lambda *_: Neither())
    assert ours[0] == serial[0]
    assert "neither" in serial[0]


def test_calls_overlap() -> None:
    """Twelve sets that need three successes each take the time of a few calls, not of all."""
    lm = ScriptedLM(lambda field, messages: field, latency=0.05)
    with dspy.context(lm=lm), Threads(64) as pool:
        start = time.perf_counter()
        _prepared(pool, num_candidate_sets=12)()
    assert time.perf_counter() - start < 0.5 * 0.05 * len(lm.calls)


def test_interrupt_starts_no_further_calls() -> None:
    """Ctrl-C ends the bootstrap with the calls that are under way, though hundreds are queued."""
    lm = ScriptedLM(lambda field, messages: field, latency=0.05)
    sets = {"num_candidate_sets": 12, "max_bootstrapped_demos": 50, "trainset": additions(200)}

    def interrupted() -> None:
        raise KeyboardInterrupt

    with dspy.context(lm=lm), Threads(4) as pool, contextlib.suppress(KeyboardInterrupt):
        _prepared(pool, on_set=interrupted, **sets)()
    done = len(lm.calls)
    assert done < 50  # those under way, and what begins until the main thread gets its turn
    time.sleep(0.1)
    assert len(lm.calls) == done


def test_what_fails_after_the_end_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Such as the executor of a program, which the interpreter closes as it exits."""
    lm = ScriptedLM(lambda field, messages: field)
    with dspy.context(lm=lm), Threads(1) as pool:

        def metric(*given: Any) -> bool:
            pool.stop()
            raise RuntimeError("cannot schedule new futures after shutdown")

        with pytest.raises(Stopped):
            _prepared(pool, metric=metric)()
    assert not caplog.records
