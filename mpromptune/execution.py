"""Work items on any executor: retries, the verdict on errors, and cancellation."""

from __future__ import annotations

import contextvars
import math
import numbers
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_random_exponential,
)

from mpromptune.errors import ScoreError
from mpromptune.limits import Stopped
from mpromptune.usage import Usage, metered, record

Score = Callable[[dict[str, int], int], float]
Keep = Callable[["Outcome"], None]


class Verdict(Enum):
    """What an exception says about the example being scored."""

    RETRY = "infrastructure failed; the call says nothing about the candidate"
    CANDIDATE = "the candidate failed; the example counts with failure_score"
    STOP = "no further call can succeed"


Classify = Callable[[BaseException], Verdict]


def classify_builtin(error: BaseException) -> Verdict:
    """The default verdict: network and timeout errors are retried, a bad score stops the run."""
    if isinstance(error, ConnectionError | TimeoutError):
        return Verdict.RETRY
    if isinstance(error, ScoreError):
        return Verdict.STOP
    return Verdict.CANDIDATE


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    Attributes:
        attempts: Calls made for one example before its trial fails.
        max_wait: Longest pause between two attempts, in seconds.
    """

    attempts: int = 6
    max_wait: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What became of one work item: a score, an error, or nothing when the run was stopped.

    Attributes:
        example: The example.
        score: Its score.
        error: What the last attempt raised.
        usage: What all attempts used.
    """

    example: int
    score: float | None = None
    error: BaseException | None = None
    usage: Usage = field(default_factory=Usage)


class Workers:
    """Scores (configuration, example) pairs on an executor.

    Every item runs in a copy of the caller's context, so that context variables (DSPy's settings
    among them) reach it, and checks the stop event before it spends anything.

    Args:
        score: ``score(params, example) -> float``.
        executor: Any ``concurrent.futures.Executor`` of this process.
        classify: The verdict on an exception of ``score``.
        retry: How often and how patiently infrastructure errors are retried.
        admits: Whether another attempt may be made, asked before each.
        stopped: Set when no further attempt may be made.
    """

    def __init__(
        self,
        score: Score,
        executor: Executor,
        classify: Classify = classify_builtin,
        retry: RetryPolicy | None = None,
        admits: Callable[[], bool] = lambda: True,
        stopped: threading.Event | None = None,
    ) -> None:
        self._score = score
        self._executor = executor
        self._classify = classify
        self._retry = retry or RetryPolicy()
        self._admits = admits
        self.stopped = stopped or threading.Event()

    def submit(self, params: Mapping[str, int], example: int, keep: Keep) -> Future[Outcome]:
        """Queues one item; the future never raises what ``score`` raised.

        Args:
            params: The configuration.
            example: The example.
            keep: Called with the outcome, in the worker, before anybody else sees it.
        """
        context = contextvars.copy_context()
        return self._executor.submit(context.run, self._kept, keep, dict(params), example)

    def verdict(self, outcome: Outcome) -> Verdict | None:
        """The verdict on a failed outcome; None for a scored or a skipped one."""
        return None if outcome.error is None else self._classify(outcome.error)

    def _kept(self, keep: Keep, params: dict[str, int], example: int) -> Outcome:
        outcome = self._measure(params, example)
        keep(outcome)
        return outcome

    def _measure(self, params: dict[str, int], example: int) -> Outcome:
        began = time.monotonic()
        with metered() as meter:
            outcome = self._outcome(params, example)
            if meter.total.program_calls:
                record(Usage(seconds=time.monotonic() - began))
        return replace(outcome, usage=meter.total)

    def _outcome(self, params: dict[str, int], example: int) -> Outcome:
        try:
            return Outcome(example, score=self._retrying()(self._scored, params, example))
        except Stopped:
            return Outcome(example)
        except Exception as error:  # noqa: BLE001 - whatever `score` raises is judged, never lost
            if self._classify(error) is Verdict.STOP:
                self.stopped.set()
            return Outcome(example, error=error)

    def _scored(self, params: dict[str, int], example: int) -> float:
        if self.stopped.is_set() or not self._admits():  # now, or while waiting for another attempt
            raise Stopped
        record(Usage(program_calls=1))
        return as_score(self._score(params, example))

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(lambda e: self._classify(e) is Verdict.RETRY),
            stop=self._give_up,
            wait=wait_random_exponential(max=self._retry.max_wait),
            sleep=sleep_using_event(self.stopped),
            reraise=True,
        )

    def _give_up(self, state: RetryCallState) -> bool:
        return self.stopped.is_set() or stop_after_attempt(self._retry.attempts)(state)


def as_score(value: Any) -> float:
    """A metric's return value as a number.

    Raises:
        ScoreError: It is not one finite real number (or bool).
    """
    if getattr(value, "ndim", None) == 0:  # scalars of numpy and torch; np.bool_ is no Real
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ScoreError(
        f"The metric returned {value!r} ({type(value).__name__}); it must return a finite number, a "
        "bool, or a prediction with such a `.score`."
    )
