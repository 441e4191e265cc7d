"""Calls the user's metric: its signature, what it returns, and what shows that it is broken."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from sysconfig import get_path
from typing import Any

import dspy

import mpromptune
from mpromptune.errors import ScoreError, beginning
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.notes import Noted
from mpromptune.execution.pool import as_score
from mpromptune.lms.errors import blame, classify

# Errors that a correct metric may raise on an answer that it cannot parse. Any other error (a name, field or
# module that does not exist, a wrong call) before the first result shows a mistake in the metric.
_OF_AN_ANSWER = (ValueError, IndexError, ArithmeticError, AssertionError)
# In messages of errors when nothing was found in an answer, as by ``re.search(...).group()``.
_NOTHING = "NoneType"
# Folders of code that is not the user's, wherever it is installed.
_LIBRARIES = (
    *(Path(inspect.getfile(package)).parent for package in (mpromptune, dspy)),
    Path(get_path("stdlib")),
)
# NOTE: most characters of an example in a message; enough to recognise it.
_SHOWN = 500
# The number of arguments that ``dspy.GEPA`` requires of a metric: the example, the prediction, the trace, the
# name of a predictor, and the trace of this predictor.
_GEPA = 5


def adapted(metric: Any) -> Callable[..., Any]:
    """The metric as DSPy calls it: with an example and a prediction, in the bootstrap also with a trace.

    A metric with GEPA's signature may require arguments without a default; those not given are None. It is
    never asked about a single predictor, as GEPA may do.
    """
    call: Callable[..., Any] = metric
    try:
        # Calling a program hides the parameters of its `forward`.
        signature = inspect.signature(metric.forward if isinstance(metric, dspy.Module) else metric)
        signature.bind(*[None] * _GEPA)
    except (TypeError, ValueError):  # another signature; functions written in C may have none
        return call
    try:
        signature.bind(None, None)
    except TypeError:
        return partial(_filled, call)
    return call


def _filled(metric: Callable[..., Any], *given: Any) -> Any:
    return metric(*given, *[None] * (_GEPA - len(given)))


def metric_value(value: Any) -> float:
    """The return value of a metric as a number; if there is feedback, it is `Noted`.

    Args:
        value: A number, a bool, or a prediction with such a ``score`` and perhaps with ``feedback``, such as
            ``ScoreWithFeedback`` of ``dspy.teleprompt.gepa``.

    Raises:
        ScoreError: It is none of these, or the number is not finite.
    """
    score = as_score(getattr(value, "score", value))
    feedback = getattr(value, "feedback", None)
    return score if feedback is None else Noted(score, feedback)


def _place(error: Exception) -> traceback.FrameSummary:
    """The innermost line of the user's own that an error went through; the innermost of all without one."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    return next((frame for frame in frames if not _is_of_a_library(frame.filename)), frames[0])


def _is_of_a_library(filename: str) -> bool:
    path = Path(filename)
    is_installed = filename.startswith("<frozen") or {"site-packages", "dist-packages"} & {*path.parts}
    return bool(is_installed) or any(folder in path.parents for folder in _LIBRARIES)


class CheckedMetric:
    """The user's metric; it ends the compile if the metric is broken.

    In an evaluation the metric must return a number (see `metric_value`). In the bootstrap, with a trace, it
    may return anything else too, because DSPy uses only its truth value. If that is not a number, and the
    metric has not worked in an evaluation yet, it is called once more without a trace, so that a metric
    without a return statement is found. An error before the metric has worked in the same way (with or
    without a trace) may show a mistake in it; a later error is a failure of the candidate.

    Args:
        metric: The metric given to MIPROv2.
        on_failure: Called when the metric turns out to be broken, before the error is raised.

    Attributes:
        failure: The error if the metric is broken.
    """

    def __init__(self, metric: Any, on_failure: Callable[[], None] = lambda: None) -> None:
        self._metric, self._call = metric, adapted(metric)
        self._on_failure = on_failure
        self._has_worked: set[bool] = set()  # True: with a trace; False: without one
        self.failure: ScoreError | None = None

    def __repr__(self) -> str:
        return repr(self._metric)

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> Any:
        """The return value of the metric as a number; in the bootstrap as it is if it is no number.

        Raises:
            ScoreError: The metric is broken.
        """
        asked = (example, prediction) if trace is None else (example, prediction, trace)
        value = self._ask(*asked)
        try:
            value = metric_value(value)  # DSPy would take a prediction with a score of 0 for a success
        except ScoreError as error:
            if trace is None:
                raise self._failed(str(error), example, prediction) from error
            if False not in self._has_worked:
                self(example, prediction)
        self._has_worked.add(trace is not None)
        return value

    def _ask(self, example: Any, prediction: Any, *trace: Any) -> Any:
        try:
            return self._call(example, prediction, *trace)
        except Exception as error:
            blame(error)
            is_answers = isinstance(error, _OF_AN_ANSWER) or _NOTHING in str(error)
            is_mistake = classify(error) is Verdict.CANDIDATE and not is_answers
            if bool(trace) in self._has_worked or not is_mistake:
                raise
            where, said = _place(error), f": {error}" if str(error) else ""
            message = (
                f"The metric raised {type(error).__name__} before it had returned anything{said} "
                f"({Path(where.filename).name}, line {where.lineno}, in {where.name})."
            )
            raise self._failed(message, example, prediction) from error

    def _failed(self, message: str, *asked: Any) -> ScoreError:
        example, prediction = (beginning(one, _SHOWN) for one in asked)
        error = ScoreError(f"{message} It was called with {example} and the prediction {prediction}.")
        self.failure = self.failure or error
        self._on_failure()
        return error
