"""Mistakes of the caller end a compile before it pays for anything, or at the first example it scores."""

from __future__ import annotations

import functools
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
import tasks
from lms import ScriptedLM, arithmetic_lm, completion, requested_fields
from tasks import FEW_SHOT, LABELLED_ONLY, TRAIN, VAL, ZERO_SHOT, Adder, Planner

import mpromptune
from mpromptune import MIPROv2
from mpromptune.engine import options
from mpromptune.errors import (
    EmbedderUnavailableError,
    InvalidArgumentError,
    ScoreError,
    SearchStoppedError,
    causes,
)
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.model.embedding import as_embedder

# Instructions wanted, and so requests for one.
WANTED = 6


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of a hundredth of a second, and two attempts."""

    def hasty(attempts: int, **given: Any) -> RetryPolicy:
        return RetryPolicy(attempts=min(attempts, 2), **{"max_wait": 0.01, **given})

    monkeypatch.setattr(options, "RetryPolicy", hasty)


def right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def compiled(
    lm: Any = None,
    metric: Any = right,
    program: Any = None,
    threads: int = 4,
    init: dict[str, Any] | None = None,
    **run: Any,
) -> Any:
    init = {"num_candidates": WANTED, "num_threads": threads, "metric": metric, **(init or {})}
    return tasks.compiled(
        Adder() if program is None else program, lm=lm, init=init, **{"sampler": "random", **run}
    )


# What can be known without a call.


class Nested(dspy.Module):
    """Its predictor is where DSPy does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [[dspy.Predict("question -> answer")]]

    def forward(self, question: str) -> Any:
        return self.steps[0][0](question=question)


def named_lm(program: Any) -> Any:
    program.solve.lm = "openai/of-a-predictor"
    return program


def marked_compiled(program: Any) -> Any:
    program._compiled = True
    return program


def other_signature(program: Any) -> Any:
    program.solve = dspy.Predict("question -> verdict")
    return program


BARE = dspy.Example(question="1+1", answer="2")
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt model by name": ({"init": {"prompt_model": "openai/gpt-4o"}}, r"prompt_model .*dspy.LM\('openai"),
    "task model by name": ({"init": {"task_model": "openai/gpt-4o"}}, r"task_model .*dspy.LM\('openai"),
    "model of another kind": ({"init": {"task_model": print}}, "task_model .*built-in function print"),
    "teacher's model": ({"init": {"teacher_settings": {"lm": "a/b"}}}, r"teacher_settings\['lm'\] .*'a/b'"),
    "teacher settings": ({"init": {"teacher_settings": ["lm"]}}, r"teacher_settings .*\['lm'\]"),
    "predictor's model": ({"program": named_lm(Adder())}, "'solve' .*openai/of-a-predictor"),
    "no predictor": ({"program": Nested()}, "student .*predictor .*an instance of Nested"),
    "class": ({"program": Adder}, "student .*instance of dspy.Module.*Adder"),
    "function": ({"program": len}, "student .*instance of dspy.Module.*len"),
    "teacher": ({"teacher": "gpt"}, "teacher .*'gpt'"),
    "teacher of other predictors": ({"teacher": Planner()}, "teacher .*'solve'.*'plan'"),
    "teacher of other signatures": ({"teacher": other_signature(Adder())}, "teacher .*'solve'.*verdict"),
    "no metric": ({"metric": None}, "metric .*None"),
    "metric by name": ({"metric": "exact"}, "metric .*'exact'"),
    "metric of one": ({"metric": lambda example: 1.0}, "metric .*too many positional arguments"),
    "metric of two": ({"metric": lambda example, prediction: 1.0}, "metric .*too many positional arguments"),
    "metric that needs a trace": ({"metric": lambda example, prediction, trace: 1.0}, "metric .*'trace'"),
    "metric's class": ({"metric": dspy.evaluate.SemanticF1}, "metric .*SemanticF1"),
    "empty trainset": ({"trainset": []}, r"trainset .*\[\]"),
    "generator": ({"trainset": (x for x in TRAIN)}, "trainset .*generator"),
    "dicts": ({"trainset": [*TRAIN, {"question": "1+1"}]}, r"trainset\[6\] .*'question': '1\+1'"),
    "no inputs": ({"trainset": [BARE]}, r"trainset\[0\] .*with_inputs"),
    "empty valset": ({"valset": []}, r"valset .*\[\]"),
    "valset of strings": ({"valset": "texts"}, "valset .*'texts'"),
    "inputs that are no fields": ({"valset": [BARE.with_inputs("qestion")]}, r"valset\[0\] .*with_inputs"),
}  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize(("given", "match"), MISTAKES.values(), ids=MISTAKES)
def test_what_can_be_known_without_a_call(given: dict[str, Any], match: str, dry_run: bool) -> None:
    """The argument and its value are named, and no LM is asked."""
    lm = arithmetic_lm()
    with pytest.raises(InvalidArgumentError, match=match):
        compiled(lm, dry_run=dry_run, **given)
    assert not lm.calls


def test_a_student_that_dspy_refuses_costs_nothing() -> None:
    """A student that has been compiled before is refused by DSPy's bootstrap, ahead of the first call."""
    lm = arithmetic_lm()
    with pytest.raises(AssertionError, match="uncompiled"):
        compiled(lm, program=marked_compiled(Adder()))
    assert not lm.calls


def test_without_options_it_is_dspys_own() -> None:
    """Without a sampler nothing is refused that DSPy does not refuse, and it does so in its own words."""
    with dspy.context(lm=arithmetic_lm()), pytest.raises(ValueError, match="at least 1 example") as caught:
        MIPROv2(metric=None, auto=None, num_candidates=2, **ZERO_SHOT).compile(
            Adder(), trainset=TRAIN, valset=[], num_trials=1
        )
    assert not isinstance(caught.value, InvalidArgumentError)


class Judge(dspy.Module):
    """A metric that is a program."""

    def forward(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return float(right(example, prediction))


class Exact:
    """A metric that is an object with ``__call__``."""

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> int:
        return int(right(example, prediction))

    def method(self, example: Any, prediction: Any, *rest: Any) -> dspy.Prediction:
        return dspy.Prediction(score=float(right(example, prediction)))


GOOD = {
    "module": Judge(),
    "object": Exact(),
    "method": Exact().method,
    "partial": functools.partial(lambda strict, e, p, trace=None: right(e, p), True),
    "any arguments": lambda *args, **kwargs: right(*args),
    "only a trace gives None": lambda e, p, trace=None: right(e, p) if trace is None else None,
    "only a trace gives text": lambda e, p, trace=None: right(e, p) if trace is None else "yes",
}


@pytest.mark.parametrize("metric", GOOD.values(), ids=GOOD)
def test_what_dspy_can_call_is_a_metric(metric: Any) -> None:
    """Functions, methods, objects and programs; with a trace, only the truth of what they return counts."""
    assert 0 <= compiled(metric=metric).score <= 100


def test_a_metric_of_two_parameters_does_where_none_is_bootstrapped() -> None:
    """Labelled demos only: DSPy calls it in evaluations, and never with a trace."""
    assert compiled(metric=lambda e, p: right(e, p), init=LABELLED_ONLY).score >= 0


# A metric that fails is found at the first example it scores.


def missing_field(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.solution == prediction.answer)


def returns(value: Any) -> Callable[..., Any]:
    return lambda example, prediction, trace=None: value


BAD: dict[str, tuple[Any, str, type[Exception] | None]] = {
    "missing field": (missing_field, "solution", AttributeError),
    "missing key": (lambda e, p, trace=None: e["solution"] == p.answer, "solution", KeyError),
    "misspelt": (lambda e, p, trace=None: exmaple.answer == p.answer, "exmaple", NameError),  # noqa: F821
    "import": (lambda e, p, trace=None: import_module("no_such_package"), "no_such_package", ImportError),
    "call": (lambda e, p, trace=None: right(e), "prediction", TypeError),
    "None": (returns(None), "returned None", None),
    "NaN": (returns(float("nan")), "returned nan", None),
    "text": (returns("right"), "returned 'right'", None),
    "dict": (returns({"score": 1.0}), "returned {'score': 1.0}", None),
    "None in evaluations": (lambda e, p, trace=None: None if trace is None else True, "returned None", None),
}


@pytest.mark.parametrize(
    ("shots", "threads"),
    [(FEW_SHOT, 1), (FEW_SHOT, 4), (ZERO_SHOT, 4), (LABELLED_ONLY, 4)],
    ids=["one thread", "few", "zero", "labelled"],
)
@pytest.mark.parametrize(("metric", "said", "cause"), BAD.values(), ids=BAD)
def test_a_metric_that_fails_ends_the_compile_at_once(
    metric: Any, said: str, cause: type[Exception] | None, shots: dict[str, int], threads: int
) -> None:
    """With its own error and the example, after as many requests as there are threads at most."""
    lm = arithmetic_lm()
    with pytest.raises(SearchStoppedError, match="The metric") as caught:
        compiled(lm, metric, threads=threads, init=shots)
    message = str(caught.value)
    assert said in message
    assert isinstance(caught.value, ScoreError)
    assert cause is None or f"({Path(__file__).name}, line " in message
    assert "'question': '" in message
    assert 1 <= len(lm.calls) <= threads
    assert caught.value.usage.total.lm_calls == len(lm.calls)
    lines = [traceback.extract_tb(e.__traceback__) for e in (caught.value, caught.value.__cause__) if e]
    ours = [line for line in chain(*lines) if Path(mpromptune.__file__).parent in Path(line.filename).parents]
    assert len(ours) == 2  # where it was called, and where it was raised again
    if cause is not None:
        (error,) = (e for e in causes(caught.value) if isinstance(e, cause) and not isinstance(e, ScoreError))
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert metric.__name__ in frames


def test_once_it_has_worked_what_a_metric_raises_is_the_candidates() -> None:
    """A prediction that lacks what the metric reads scores ``failure_score``, and the compile goes on."""
    seen: list[bool] = []
    lock = threading.Lock()

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        with lock:
            worked = len(seen) >= 8
            seen.append(right(example, prediction))
        if worked and trace is None and example.question == VAL[-1].question:
            raise AttributeError("no such part of the answer")
        return right(example, prediction)

    result = compiled(metric=metric, threads=1, failure_score=-1.0).search_result
    (scores,) = (m.scores for m in result.configurations if m.params == result.best_params)
    assert scores[len(VAL) - 1] == -1.0
    assert -1.0 not in [score for example, score in scores.items() if example < len(VAL) - 1]


UNREADABLE = {
    "cannot convert": int,
    "finds nothing": lambda how: re.search("style", how).group(),
    "takes nothing": lambda how: re.search("style", how)[0],
}


@pytest.mark.parametrize("fails", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_cannot_be_read_is_no_mistake_of_the_metric(fails: Any) -> None:
    """What metrics raise over one, from the first example on, is a wrong answer as it has always been."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if "style" not in prediction.how:
            fails(prediction.how)
        return right(example, prediction)

    class Styled(Adder):
        def forward(self, question: str) -> Any:
            prediction = super().forward(question)
            prediction.how = self.solve.signature.instructions
            return prediction

    best = compiled(metric=metric, program=Styled(), init={"max_errors": 1000}, confirm=True)
    result = best.search_result
    assert result.baseline_score == 0.0
    assert result.best_score > 0.0


# One request for an instruction that comes to nothing.


class Proposing(ScriptedLM):
    """Answers as ``arithmetic_lm``, but for requests of a field, of which some fail.

    Args:
        field: The field.
        fails: Says for each request that asks for it, by what it shows of the task, whether it fails.
        how: An error that is raised, or the text of an answer.
    """

    def __init__(self, field: str, fails: Callable[[int], bool], how: Exception | str) -> None:
        self._plain = arithmetic_lm()
        super().__init__(self._plain._answer)
        self._field, self._fails, self._how = field, fails, how
        self._known: list[str] = []

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        asked = repr(messages)
        if requested_fields(messages or [{"content": ""}])[-1:] != [self._field]:
            return super().forward(prompt, messages, **kwargs)
        with self._lock:
            if asked not in self._known:
                self._known.append(asked)
            fails = self._fails(self._known.index(asked))
        if not fails:
            return super().forward(prompt, messages, **kwargs)
        self.calls.append(messages or [])
        if isinstance(self._how, Exception):
            raise self._how
        return completion(self._how, self.model)


EMPTY = "[[ ## proposed_instruction ## ]]\n\n[[ ## completed ## ]]"
NOTHING: dict[str, Exception | str] = {
    "nothing": "",
    "empty field": EMPTY,
    "no field": "I cannot help with that.",
    "down": ConnectionError("down"),
    "refused": RuntimeError("content filter"),
}


def instructions(best: Any) -> int:
    """Candidates of the only predictor."""
    (trial, *_) = best.search_result.study.trials
    return len(trial.distributions["0_predictor_instruction"].choices)


@functools.lru_cache
def all_instructions() -> int:
    """Candidates where no request fails."""
    return instructions(compiled(Proposing("proposed_instruction", lambda i: False, ""), threads=1))


@pytest.mark.parametrize("how", NOTHING.values(), ids=NOTHING)
def test_one_instruction_that_fails_costs_that_one(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    """All others are candidates, and one line says so."""
    with caplog.at_level(logging.WARNING, "mpromptune"):
        best = compiled(Proposing("proposed_instruction", lambda i: i == 1, how), threads=1)
    (said,) = (r.getMessage() for r in caplog.records if "requests for an instruction" in r.getMessage())
    assert f"1 of {WANTED}" in said
    assert instructions(best) == all_instructions() - 1


@pytest.mark.parametrize("how", NOTHING.values(), ids=NOTHING)
def test_no_instruction_at_all_is_an_error(how: Any) -> None:
    """A prompt model that gives none at all ends the compile before the search, as it does DSPy's."""
    asked = Proposing("proposed_instruction", lambda i: True, how)
    with pytest.raises(Exception, match=r"down|filter|instruction|parse|empty answer"):
        compiled(asked, threads=1, confirm=False)
    assert not any(VAL[0].question in str(messages) for messages in asked.calls)


def test_a_key_that_is_refused_stops_the_compile() -> None:
    """What no further request could survive is not one instruction's trouble."""

    class AuthenticationError(Exception):
        __module__ = "openai"

    with pytest.raises(SearchStoppedError, match="bad key"):
        compiled(Proposing("proposed_instruction", lambda i: i == 1, AuthenticationError("bad key")))


@pytest.mark.parametrize("field", ["observations", "summary", "program_description", "module_description"])
@pytest.mark.parametrize("how", ["", ConnectionError("down")], ids=["nothing", "down"])
def test_what_proposals_can_do_without(field: str, how: Any) -> None:
    """Without a summary of the data or a description of the program, all instructions are proposed."""
    lm = Proposing(field, lambda i: True, how)
    best = compiled(lm)
    asked = [requested_fields(messages)[-1:] for messages in lm.calls]
    assert asked.count(["proposed_instruction"]) == WANTED
    assert best.score >= 0


# The default model by its name.


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_default_model_by_its_name(name: str) -> None:
    """It comes from the package that carries it, as without a name; no hub is asked."""
    texts = ["Think step by step.", "Bananas are yellow."]
    # Two copies of a model may be summed in another order, by how their weights lie in memory.
    np.testing.assert_allclose(as_embedder(name)(texts), as_embedder()(texts), rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_had_costs_nothing() -> None:
    """It is found before any request, and what is installed is not to be installed."""
    lm = arithmetic_lm()
    with pytest.raises(EmbedderUnavailableError, match=r"embedder=None.*is installed"):
        compiled(lm, sampler="qei", embedder="no-such/model")
    assert not lm.calls


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``HF_HUB_OFFLINE``, and with nobody at the hub's address, the error comes in seconds."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    as_embedder()(["text"])  # loads the libraries
    began = time.monotonic()
    with pytest.raises(EmbedderUnavailableError, match="no-such/other"):
        as_embedder("no-such/other")(["text"])
    assert time.monotonic() - began < 20
