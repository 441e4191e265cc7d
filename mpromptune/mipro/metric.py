"""A metric that cannot score is found at the first example that it is asked to score."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from mpromptune.errors import ScoreError
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.interrupts import SLICE, Stopped, check_stopped
from mpromptune.lms.errors import blame, classify
from mpromptune.mipro.configurations import metric_value

# What a correct metric may raise over an answer that it cannot read. Anything else (a name, a field or a
# module that does not exist, a wrong call) is a mistake in it, if it comes before its first result.
_OF_AN_ANSWER = (ValueError, IndexError, ArithmeticError, AssertionError)
# As Python names it where nothing was found in an answer, as in ``re.search(...).group()``.
_NOTHING = "NoneType"
# NOTE: characters of an example that a message shows; enough to recognise it.
_SHOWN = 500


class CheckedMetric:
    """The user's metric, which ends the compile where no score of it could be right.

    In an evaluation it has to return a number. In the bootstrap, where it is given a trace, it may return
    anything: DSPy takes its truth. If that is no number, and the metric has not worked in an evaluation yet,
    it is called once more as in one. So a metric without a return statement is found. What it raises before
    it has worked, with a trace or without as in this call, may be a mistake in it; later on it is the
    candidate's failure.

    Args:
        metric: As given to MIPROv2.
        on_failure: Called once it cannot score, before the error is raised.

    Attributes:
        failure: Why it cannot score.
        known: Set once it has worked, or cannot score, or need not be waited for.
    """

    def __init__(self, metric: Any, on_failure: Callable[[], None] = lambda: None) -> None:
        self._metric = metric
        self._on_failure = on_failure
        self._has_worked: set[bool] = set()  # True: with a trace; False: without one
        self.failure: ScoreError | None = None
        self.known = Event()

    def __repr__(self) -> str:
        return repr(self._metric)

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> Any:
        """What the metric returns; in an evaluation, as a number.

        Raises:
            ScoreError: It cannot score.
        """
        asked = (example, prediction) if trace is None else (example, prediction, trace)
        value = self._ask(*asked)
        try:
            number = metric_value(value)
        except ScoreError as error:
            if trace is None:
                raise self._failed(str(error), example, prediction) from error
            if False not in self._has_worked:
                self(example, prediction)
        self._has_worked.add(trace is not None)
        self.known.set()
        return number if trace is None else value

    def wait(self) -> None:
        """Waits until it is `known` whether it works.

        Raises:
            Stopped: It does not, or nobody waits any more.
        """
        while not self.known.wait(SLICE):
            check_stopped()
        if self.failure is not None:
            raise Stopped

    def _ask(self, example: Any, prediction: Any, *trace: Any) -> Any:
        try:
            return self._metric(example, prediction, *trace)
        except Exception as error:
            blame(error)
            is_answers = isinstance(error, _OF_AN_ANSWER) or _NOTHING in str(error)
            is_mistake = classify(error) is Verdict.CANDIDATE and not is_answers
            if bool(trace) in self._has_worked or not is_mistake:
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (
                f"The metric raised {type(error).__name__} before it had returned anything: {error} "
                f"({Path(where.filename).name}, line {where.lineno}, in {where.name})."
            )
            raise self._failed(message, example, prediction) from error

    def _failed(self, message: str, *asked: Any) -> ScoreError:
        texts = map(repr, asked)
        example, prediction = (t if len(t) <= _SHOWN else f"{t[:_SHOWN]}..." for t in texts)
        error = ScoreError(f"{message} It was asked about {example} and the prediction {prediction}.")
        self.failure = self.failure or error
        self._on_failure()
        self.known.set()
        return error
