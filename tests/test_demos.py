"""Demo sets as JSON: predictors are prompted with the loaded ones as with the others."""

from __future__ import annotations

import datetime
import json
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from tasks import Adder

from mpromptune.local.adapter import CompletionAdapter
from mpromptune.mipro.checkpoint import demos_from_json, demos_to_json, require_same_prompts


class Step(pydantic.BaseModel):
    what: str
    cost: float | None = None


def _program(signature: Any, **types: Any) -> Any:
    return dspy.Predict(dspy.Signature(signature, custom_types=types) if types else dspy.Signature(signature))


CASES = [
    ("question -> answer", {}, {"question": "1+1", "answer": "2 ü \u2028", "augmented": True}),
    ("question -> answer", {}, {"question": "1+1"}),
    ("question -> answer", {}, {"question": ["a", "b"], "answer": None}),
    (  # in a string, DSPy 3.2 finds no types of one's own within others
        {"question": (str, dspy.InputField()), "steps": (list[Step], dspy.OutputField())},
        {},
        {"question": "q", "steps": [Step(what="add", cost=1.0)]},
    ),
    ("question -> step: Step", {"Step": Step}, {"question": "q", "step": Step(what="add")}),
    ("day: datetime.date -> n: int", {}, {"day": datetime.date(2026, 1, 2), "n": 3}),
    ("image: dspy.Image -> label", {}, {"image": dspy.Image("https://example.org/a.png"), "label": "cat"}),
    ("x: list[float] -> y: bool", {}, {"x": [1.0, 2.5], "y": True}),
    ("question -> answer", {}, {"question": "q", "answer": "a", "extra": np.arange(3), "fn": len}),
]


@pytest.mark.parametrize(
    "adapter",
    [None, dspy.JSONAdapter(), dspy.XMLAdapter(), CompletionAdapter()],
    ids=["chat", "json", "xml", "completion"],
)
@pytest.mark.parametrize(("signature", "types", "fields"), CASES)
def test_same_prompts(signature: Any, types: Any, fields: dict[str, Any], adapter: Any) -> None:
    """Text, numbers, lists, models, dates and images are prompted with as before."""
    program = _program(signature, **types)
    demos = [dspy.Example(fields)]
    loaded = demos_from_json(json.loads(json.dumps(demos_to_json(demos))))
    with dspy.context(adapter=adapter):
        require_same_prompts(program, {0: [demos]}, {0: [loaded]})
    assert set(loaded[0].keys()) == fields.keys()


def test_demos_of_an_empty_set() -> None:
    """A set without demos stays one."""
    assert demos_from_json(demos_to_json([])) == []


def test_plain_demos_are_equal() -> None:
    """Demos of text and numbers come back as they were, augmented or not."""
    demos = [dspy.Example(augmented=True, question="1+1", answer=2), dspy.Example(question="q", answer=0.5)]
    assert demos_from_json(demos_to_json(demos)) == demos


def test_other_prompts_are_noticed() -> None:
    """A value that would be formatted differently is a ValueError."""
    demos, loaded = (
        [dspy.Example(question="q", answer=("a", "b"))],
        [dspy.Example(question="q", answer=["a", "b"])],
    )
    with pytest.raises(ValueError, match="formatted differently"):
        require_same_prompts(Adder(), {0: [demos]}, {0: [loaded]})
