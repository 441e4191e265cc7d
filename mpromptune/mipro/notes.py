"""The note of a program call (see `mpromptune.Noted`), from which proposers learn what went wrong.

A note is a dict. ``inputs`` and ``outputs`` of the program, and ``expected``, the labels of the example, map
field names to texts; ``predictors`` maps the name of a predictor to its own ``inputs`` and ``outputs``;
``feedback`` is a text of the metric, the error of a failed call, or None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from mpromptune.execution.notes import as_text
from mpromptune.operators.texts import value_text


def note_of_call(
    program: dspy.Module,
    example: dspy.Example,
    trace: Sequence[tuple[Any, Mapping[str, Any], Any]],
    prediction: Any = None,
    feedback: Any = None,
) -> dict[str, Any]:
    """The note of a call.

    Args:
        program: The program that was called.
        example: The example.
        trace: DSPy's trace of the call: predictor, inputs and outputs of each call of a predictor. Of
            several calls of a predictor, the last one is noted.
        prediction: What the program returned; None if it failed.
        feedback: What the metric said, or the error of the call.
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    calls = {names[id(one)]: (given, said) for one, given, said in trace if id(one) in names}
    return {
        "inputs": _texts(example.inputs()),
        "outputs": _texts(prediction),
        "expected": _texts(example.labels()),
        "feedback": _said(feedback),
        "predictors": {
            name: {"inputs": _texts(given), "outputs": _texts(said)} for name, (given, said) in calls.items()
        },
    }


def _said(feedback: Any) -> str | None:
    if isinstance(feedback, BaseException):
        return f"{type(feedback).__name__}: {as_text(feedback)}"
    return None if feedback is None else _text(feedback)


def _texts(fields: Any) -> dict[str, str]:
    """The fields of an example, a prediction or a mapping as texts."""
    if fields is None:
        return {}
    pairs = fields.items() if isinstance(fields, Mapping | dspy.Example) else [("output", fields)]
    return {str(name): _text(value) for name, value in pairs}


def _text(value: Any) -> str:
    """A value as it is in prompts and in DSPy's saved programs: texts as they are, others as JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(serialize_for_json(value), ensure_ascii=False)
    except Exception:  # noqa: BLE001 - pydantic and classes of the user raise many kinds
        text = as_text(value)
    return value_text(text)
