"""Fingerprints: the same in every process for the same run, another one for another run."""

from __future__ import annotations

import datetime
import functools
from decimal import Decimal
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
import torch
from tasks import Adder, Counted, Planner

from mpromptune.mipro.fingerprint import _of_callable, _of_program, canonical, differences, digest


class Thing:
    """Without a repr of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Record(pydantic.BaseModel):
    name: str
    tags: set[str]


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def close(example: Any, prediction: Any, trace: Any = None, within: float = 1.0) -> bool:
    return abs(float(example.answer) - float(prediction.answer)) <= within


def _values() -> list[Any]:
    """One of each kind, made anew."""
    return [
        None,
        "text \ud800",
        1.5,
        float("nan"),
        {"b": (1, 2), "a": [True]},
        {"x", "y", "z"},
        frozenset({1, "a"}),
        b"bytes",
        datetime.datetime(2026, 1, 2),
        Decimal("1.5"),
        Path("a/b"),
        Thing({"x", "y"}),
        Record(name="n", tags={"x", "y"}),
        dspy.Image("https://example.org/a.png"),
        dspy.Example(question="q", extra=Thing(1)).with_inputs("question"),
        np.arange(6).reshape(2, 3),
        torch.ones(2),
        lambda x: x,
    ]


def _digests() -> list[str]:
    metrics = [
        exact,
        Counted(),
        functools.partial(close, within=2),
        lambda e, p, t=None: e.answer in {"1", "2"},
    ]
    programs = [Adder(), Planner(), dspy.ChainOfThought("question -> answer: list[int]")]
    return [
        *map(digest, _values()),
        *(digest(_of_callable(metric)) for metric in metrics),
        *map(_of_program, programs),
    ]


def _write_digests(path: Path) -> None:
    path.write_text("|".join(_digests()))


def test_same_in_another_process(forks: Any, tmp_path: Path) -> None:
    """Neither addresses nor the order of sets, which differ from process to process, are part of it."""
    process = forks.Process(target=_write_digests, args=(tmp_path / "digests",))
    process.start()
    process.join()
    assert (tmp_path / "digests").read_text().split("|") == _digests()


def test_kinds_differ() -> None:
    """No two values that differ have one digest."""
    digests = [digest(value) for value in _values()]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Thing(1), Thing(2)),
        (np.zeros(2), np.zeros(3)),
        (np.zeros(1000), np.r_[np.zeros(500), 1, np.zeros(499)]),
        (dspy.Example(a=1), dspy.Example(a=2)),
        (Record(name="n", tags={"x"}), Record(name="n", tags={"y"})),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        ([1, [2]], [[1], 2]),
        ("1", 1),
    ],
)
def test_contents_count(one: Any, other: Any) -> None:
    """What a value holds is part of it, even deep inside and where a repr leaves it out."""
    assert digest([{"value": one}]) != digest([{"value": other}])


def test_values_that_contain_themselves() -> None:
    """They end."""
    value: dict[str, Any] = {"a": 1}
    value["self"] = [value]
    thing = Thing(None)
    thing.value = thing
    assert canonical(value) == {"a": 1, "self": ["..."]}
    assert canonical(thing) == ["Thing", {"value": "..."}]


def test_metrics_differ() -> None:
    """Functions by their source, partials by their arguments, lambdas by what they do, objects by class."""
    metrics = [
        exact,
        close,
        functools.partial(close, within=2),
        functools.partial(close, within=3),
        lambda e, p, t=None: e.answer == p.answer,
        lambda e, p, t=None: e.answer != p.answer,
        Counted(),
        Counted().__call__,
    ]
    digests = {digest(_of_callable(metric)) for metric in metrics}
    assert len(digests) == len(metrics)
    used = Counted()
    used.calls = 5
    assert _of_callable(used) == _of_callable(Counted())


def test_a_lambda_is_not_its_line() -> None:
    """What else stands in the line in which a lambda is written does not count."""
    first, threads = (lambda e, p: e == p), 8
    second = lambda e, p: e == p  # noqa: E731
    assert threads
    assert digest(_of_callable(first)[1]) == digest(_of_callable(second)[1])


def test_programs_differ() -> None:
    """By class, instructions, fields, demos, answer-changing settings, and the predictors' own models."""
    programs = [Planner() for _ in range(7)]
    programs[1].plan.signature = programs[1].plan.signature.with_instructions("Plan.")
    programs[2].plan.demos = [dspy.Example(question="1", plan="2")]
    programs[3].plan.config = {"temperature": 0.5}
    programs[4].plan.lm = dspy.LM("openai/one", api_key="sk-1")
    programs[5].plan.lm = dspy.LM("openai/two", api_key="sk-1")
    programs[6].plan.signature = programs[6].plan.signature.with_updated_fields("plan", desc="in short")
    digests = [_of_program(program) for program in [*programs, Adder()]]
    assert len(set(digests)) == len(digests)


def test_keys_are_no_part() -> None:
    """Another API key is no other run."""
    one, two = Planner(), Planner()
    one.plan.lm = dspy.LM("openai/one", api_key="sk-1")
    two.plan.lm = dspy.LM("openai/one", api_key="sk-2")
    two.plan.config = {"api_key": "sk-2"}
    assert _of_program(one) == _of_program(two)
    assert digest(functools.partial(close, one.plan.lm)) == digest(functools.partial(close, two.plan.lm))


def test_differences_are_named() -> None:
    """Each with what it was and what it is; also where there was none."""
    then, now = {"seed": 9, "metric": "exact 1", "old": 1}, {"seed": 10, "metric": "exact 1", "new": None}
    assert differences(then, now) == ["seed (9 then, 10 now)", "old (1 then, None now)"]
    assert differences(now, now) == []
