"""Scores of the student that a search ends up with in any case, made by threads that idle before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mpromptune.execution.attempts import FAILURES
from mpromptune.execution.pool import Score
from mpromptune.execution.usage import Usage, current_meter, record
from mpromptune.lms.errors import classify
from mpromptune.lms.guard import measured
from mpromptune.lms.kept import Keeping
from mpromptune.mipro.checkpoint import Checkpoint


class Ahead:
    """Scores the student for as long as there is hope, and hands the scores on.

    It ends where the bootstrap would: after ``max_errors`` errors, or one that is not the program's own.

    Args:
        program: The student.
        valset: The validation set.
        score: The student's score on one example.
        max_errors: So many of the student's own errors are enough.
        checkpoint: Keeps the scores, and has those of an interrupted run.
        keep: Of the examples, each named by its number.
    """

    def __init__(
        self,
        program: Any,
        valset: list[Any],
        score: Callable[[int], float],
        max_errors: int,
        checkpoint: Checkpoint | None,
        keep: Keeping,
    ) -> None:
        self.program = program
        self.valset = valset
        self._score = score
        self._max_errors = max_errors
        self._checkpoint = checkpoint
        self._keep = keep
        self._outcomes = {} if checkpoint is None else checkpoint.student_outcomes()
        self._of_earlier_run = set(self._outcomes)

    def calls(self, examples: list[int]) -> Iterator[Callable[[], None]]:
        """One for each example, for as long as there is hope."""
        for example in examples:
            if self._is_hopeless():
                return
            if example not in self._outcomes:
                yield partial(self._measure, example)

    def forget(self, examples: set[int]) -> None:
        """Leaves out scores that the search has already: asked again, it wants another answer."""
        for example in examples:
            self._outcomes.pop(example, None)

    def _is_hopeless(self) -> bool:
        errors = [o for o, _ in tuple(self._outcomes.values()) if isinstance(o, Exception)]
        foreign = any(classify(error) not in FAILURES for error in errors)
        return foreign or len(errors) >= self._max_errors

    def _measure(self, example: int) -> None:
        began = time.monotonic()
        with measured() as meter:
            record(Usage(program_calls=1))
            outcome = self._outcome(example)
            record(Usage(seconds=time.monotonic() - began))
        self._outcomes[example] = outcome, meter.total
        if self._checkpoint is not None:
            self._checkpoint.keep_student_outcome(example, outcome, meter.total)

    def _outcome(self, example: int) -> float | Exception:
        try:
            with self._keep(example):
                return self._score(example)
        except Exception as error:  # noqa: BLE001 - raised where the score is asked for
            return error

    def score_or(self, score: Score, student: dict[str, int], params: dict[str, int], example: int) -> float:
        """What came of it, once: after an error, another attempt is a call of its own."""
        known = self._outcomes.pop(example, None) if params == student else None
        if known is None:
            return score(params, example)
        outcome, usage = known
        meter = current_meter()
        if meter is not None:
            meter.add(Usage(program_calls=-1))  # the program has not been run for this call
            # What this run has made ahead the search as a whole has counted already.
            (meter.add if example in self._of_earlier_run else meter.attribute)(usage)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
