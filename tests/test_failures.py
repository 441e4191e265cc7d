"""What a compile does when metrics or language models misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.utils import exceptions as dspy_errors
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm
from optuna.trial import TrialState
from tasks import SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2
from mpromptune.engine import options
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.storage.attributes import SCORES


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of a hundredth of a second, and three attempts."""

    def hasty(attempts: int, **given: Any) -> RetryPolicy:
        return RetryPolicy(attempts=min(attempts, 3), **{"max_wait": 0.01, **given})

    monkeypatch.setattr(options, "RetryPolicy", hasty)


def _compile(metric: Any, program: Any = None, lm: ScriptedLM | None = None, **given: Any) -> Any:
    run = {**SMALL_RUN, "sampler": "qei", "embedder": hashed, "block_size": 4, "batch_size": 2, **given}
    with dspy.context(lm=lm or arithmetic_lm()):
        optimizer = MIPROv2(metric=metric, auto=None, num_candidates=4, num_threads=4, **ZERO_SHOT)
        return optimizer.compile(program or Adder(), trainset=TRAIN, valset=VAL, **run)


def _right(example: Any, prediction: Any) -> bool:
    return bool(example.answer == prediction.answer)


class Failing(Adder):
    """Fails where ``fails(instruction, call number)`` names an error."""

    def __init__(self, fails: Callable[[str, int], Exception | None]) -> None:
        super().__init__()
        self.state = Shared(fails)

    def forward(self, question: str) -> Any:
        self.state.check(self.solve.signature.instructions)
        return super().forward(question)


class Shared:
    """One counter for a program and all of its copies."""

    def __init__(self, fails: Callable[[str, int], Exception | None]) -> None:
        self.fails = fails
        self.calls = 0
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Shared:
        return self

    def check(self, instruction: str) -> None:
        with self.lock:
            self.calls += 1
            error = self.fails(instruction, self.calls)
        if error is not None:
            raise error


class EveryOther(threading.local):
    """True for every other call of a thread, so that a retry in the same thread succeeds."""

    last = False

    def __call__(self) -> bool:
        self.last = not self.last
        return self.last


@pytest.mark.parametrize(
    "convert",
    [
        bool,
        float,
        int,
        np.float32,
        np.bool_,
        np.array,
        lambda s: dspy.Prediction(score=float(s), feedback="x"),
    ],
    ids=["bool", "float", "int", "float32", "bool_", "array", "Prediction"],
)
def test_metrics_may_return(convert: Callable[[bool], Any]) -> None:
    """A bool, a number, a numpy scalar and a Prediction with a score all give the same search."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        right = _right(example, prediction)
        return right if trace is not None else convert(right)  # the bootstrap takes the truth of it

    expected = _compile(Counted())
    best = _compile(metric)
    assert best.score == expected.score
    assert best.search_result.best_params == expected.search_result.best_params


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "None"),
        ("1.0", "'1.0'"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ({"score": 1.0}, "{'score': 1.0}"),
        (dspy.Prediction(score=None), "None"),
        (dspy.Prediction(feedback="x"), "feedback"),
        ("x" * 10**4, "xxx... (str)"),
    ],
)
def test_metrics_may_not_return(value: Any, named: str) -> None:
    """Anything else stops the search, names the value, and is nowhere recorded as a score."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        return value if trace is None else True

    with pytest.raises(SearchStoppedError, match="The metric returned") as caught:
        _compile(metric)
    assert named in str(caught.value)
    assert caught.value.study is None  # the student's first score shows it, before there is a search


def test_what_a_candidate_cannot_answer_scores_failure_score(caplog: pytest.LogCaptureFixture) -> None:
    """Unparsable answers of one candidate cost it its score, and the others nothing."""

    def fails(instruction: str, call: int) -> Exception | None:
        signature = dspy.Signature("question -> answer")
        bad = instruction.startswith("Add")
        return dspy_errors.AdapterParseError("ChatAdapter", signature, "???") if bad else None

    metric = Counted()
    best = _compile(metric, Failing(fails), failure_score=-0.5, max_calls=30)
    result = best.search_result
    assert result.calls == 30
    assert result.best_params == {"0_predictor_instruction": 0}
    others = [m for m in result.configurations if m.params != result.best_params]
    assert {score for m in others for score in m.scores.values()} == {-0.5}
    assert metric.calls == len(VAL)
    assert "AdapterParseError" in caplog.text


def test_a_failing_candidate_alone_in_its_round_does_not_stop_the_search() -> None:
    """With batch_size=1 a round can fail as a whole through its candidate; the search goes on."""

    def fails(instruction: str, call: int) -> Exception | None:
        return KeyError("plan") if instruction.startswith("Add") else None

    best = _compile(Counted(), Failing(fails), batch_size=1, max_calls=30)
    assert best.search_result.best_params == {"0_predictor_instruction": 0}


def test_a_program_that_always_fails_stops_the_search() -> None:
    """When the baseline cannot be run at all there is nothing to search for."""
    with pytest.raises(SearchStoppedError, match="KeyError"):
        _compile(Counted(), Failing(lambda instruction, call: KeyError("plan")))


@pytest.mark.skipif(not hasattr(dspy_errors, "LMAuthError"), reason="this DSPy has no LMAuthError")
def test_authentication_errors_stop_at_once() -> None:
    """No further call is made once the provider refuses the key; what was measured is in the study."""
    metric = Counted()

    def fails(instruction: str, call: int) -> Exception | None:
        return dspy_errors.LMAuthError("bad key") if metric.calls >= 8 else None

    program = Failing(fails)
    with pytest.raises(SearchStoppedError, match="LMAuthError: bad key") as caught:
        _compile(metric, program, confirm=False)
    assert isinstance(caught.value.__cause__, dspy_errors.LMAuthError)
    states = {t.state for t in caught.value.study.trials}  # type: ignore[attr-defined]
    assert TrialState.RUNNING not in states
    assert metric.calls < 8 + 4  # at most one more per thread


@pytest.mark.skipif(not hasattr(dspy_errors, "LMRateLimitError"), reason="this DSPy has no LMRateLimitError")
def test_rate_limits_are_retried() -> None:
    """Every request is refused once; no score is lost and none is counted twice."""
    metric = Counted()
    every_other = EveryOther()

    def fails(instruction: str, call: int) -> Exception | None:
        return dspy_errors.LMRateLimitError("slow down") if metric.calls and every_other() else None

    program = Failing(fails)
    result = _compile(metric, program, max_calls=36).search_result
    assert 24 <= result.calls == metric.calls <= 36
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    assert program.state.calls >= 2 * (metric.calls - 1)


@pytest.mark.skipif(not hasattr(dspy_errors, "LMServerError"), reason="this DSPy has no LMServerError")
def test_errors_raised_by_the_lm_itself_arrive_unchanged() -> None:
    """A server error raised inside the LM's call is retried, whatever DSPy wraps around it."""
    lm = arithmetic_lm()
    forward, seen, every_other = lm.forward, [], EveryOther()

    def flaky(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if metric.calls and every_other():
            raise dspy_errors.LMServerError("overloaded")
        return forward(*args, **kwargs)

    metric = Counted()
    lm.forward = flaky  # type: ignore[method-assign]
    result = _compile(metric, lm=lm, max_calls=36).search_result
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    assert 24 <= result.calls == metric.calls < len(seen)


def test_timeout_and_retries_are_options() -> None:
    """A call that hangs is made again after `timeout`; without retries its trial fails instead."""
    release = threading.Event()

    class Hanging(Counted):
        hung = False

        def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
            value = super().__call__(example, prediction, trace)
            if self.calls == 5 and not self.hung:
                self.hung = True
                release.wait(60)
            return value

    states = {}
    for retries in (1, 0):
        result = _compile(Hanging(), timeout=0.5, max_retries=retries, confirm=False).search_result
        states[retries] = {t.state for t in result.study.trials}
    release.set()
    assert states[1] == {TrialState.COMPLETE}
    assert TrialState.FAIL in states[0]


def test_an_outage_of_the_lm_with_an_unknown_error_stops() -> None:
    """A custom LM that raises RuntimeError for everybody, in mid-run: none of it is a score."""
    lm = arithmetic_lm()
    forward = lm.forward

    def down(*args: Any, **kwargs: Any) -> Any:
        if metric.calls >= 24:
            raise RuntimeError("the tunnel is closed")
        return forward(*args, **kwargs)

    metric = Counted()
    lm.forward = down  # type: ignore[method-assign]
    with pytest.raises(SearchStoppedError, match="the tunnel is closed") as caught:
        _compile(metric, lm=lm, failure_score=-1.0, confirm=False)
    trials = caught.value.study.trials  # type: ignore[attr-defined]
    assert not any(-1.0 in t.user_attrs.get(SCORES, []) for t in trials)
    assert caught.value.program.search_result.calls == caught.value.result.calls <= metric.calls
