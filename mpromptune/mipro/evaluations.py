"""Trials as DSPy's evaluations, for whoever listens to them: MLflow's autologging, callbacks of the user."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import BaseCallback, with_callbacks
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpromptune.errors import TrialFailedError
from mpromptune.execution.interrupts import deferred
from mpromptune.mipro.configurations import ProgramSpace
from mpromptune.mipro.records import percent
from mpromptune.storage.attributes import EXAMPLES, PLANNED, SCORES
from mpromptune.storage.ledger import Ledger

_HANDLERS = ("on_evaluate_start", "on_evaluate_end")


class Predictions:
    """What programs answered, until its trial is told; nothing is kept where nobody listens.

    Two trials that measure one configuration on one example at the same time share the later answer.
    """

    def __init__(self) -> None:
        self.wanted = any(map(_listens, dspy.settings.callbacks or ()))
        self._kept: dict[tuple[object, int], Any] = {}

    def keep(self, params: Mapping[str, int] | None, example: int, prediction: Any) -> None:
        """Keeps one; any thread may. Without ``params`` it is the student's, made ahead of the search."""
        if self.wanted:
            self._kept[_key(params), example] = prediction

    def take(self, params: Mapping[str, int] | None, example: int) -> Any:
        """Takes one out; None where there is none."""
        return self._kept.pop((_key(params), example), None)


class Evaluations:
    """Has DSPy's callbacks see every trial as one call of ``dspy.Evaluate``, in the order of the trials.

    A search makes no such call: threads take single examples, and trials overlap. Those who listen
    expect one evaluation after the other, all from the thread of the compile. So each is called when
    its trial is told, and is over at once. It is as in DSPy's MIPROv2: the program and its examples
    go in, the score in percent and ``(example, prediction, score)`` come out, and the metadata tell
    full evaluations from minibatches. The trial that completes the measurement of a configuration is
    a full one, of all of its scores. Predictions of earlier trials are empty; a trial that lacks
    scores ends with a `TrialFailedError`.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: What they were scored with.
        predictions: Of the trials that are not told yet.
    """

    def __init__(
        self, programs: ProgramSpace, valset: Sequence[Any], metric: Any, predictions: Predictions
    ) -> None:
        self._programs = programs
        self._valset = valset
        self._metric = metric
        self._predictions = predictions

    def on_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A trial was told."""
        if not self._predictions.wanted:
            return
        examples, outcome = self._outcome(study, trial)
        kind = "eval_full" if len(examples) == len(self._valset) else "eval_minibatch"
        evaluation = _Evaluation(outcome, devset=list(self._valset), metric=self._metric)
        devset = [self._valset[i] for i in examples]
        try:
            with deferred():  # or a run of MLflow's would stay open, and the compile's with it
                evaluation(
                    self._programs.build(trial.params), devset=devset, callback_metadata={"metric_key": kind}
                )
        except TrialFailedError:
            pass  # those who listen have been told

    def _outcome(
        self, study: Study, trial: FrozenTrial
    ) -> tuple[list[int], EvaluationResult | TrialFailedError]:
        """The examples of an evaluation, and what came of it."""
        answers = {i: self._answer(trial.params, i) for i in trial.user_attrs[EXAMPLES]}
        if trial.state != TrialState.COMPLETE:
            planned = list(trial.user_attrs[PLANNED])
            lost = len(planned) - len(answers)
            return planned, TrialFailedError(
                f"Trial {trial.number} lacks the scores of {lost} of {len(planned)} examples, for errors "
                "that are not the program's."
            )
        scores = self._scores(study, trial)
        results = [(self._valset[i], answers.get(i, dspy.Prediction()), scores[i]) for i in scores]
        mean = sum(scores.values()) / len(scores)
        return list(scores), EvaluationResult(score=percent(mean), results=results)

    def _answer(self, params: Mapping[str, int], example: int) -> Any:
        answer = self._predictions.take(params, example)
        if answer is None and params == self._programs.baseline:
            answer = self._predictions.take(None, example)
        return dspy.Prediction() if answer is None else answer

    def _scores(self, study: Study, trial: FrozenTrial) -> dict[int, float]:
        """The trial's own, or all of its configuration's once they are complete by it."""
        n, known, own = len(self._valset), Ledger(), _scores_of(trial)
        for other in study.get_trials(deepcopy=False):
            if other.params == trial.params and other.number != trial.number:
                known.add((), _scores_of(other))
        was_complete = known.covers((), n)
        known.add((), own)
        completes = known.covers((), n) and (len(own) == n or not was_complete)
        return known.means(()) if completes else own


class _Evaluation(dspy.Evaluate):
    """An evaluation that has been made: called, it only says what came of it."""

    def __init__(self, outcome: EvaluationResult | TrialFailedError, **settings: Any) -> None:
        super().__init__(**settings)
        self._outcome = outcome

    def _replay(self, *args: Any, **kwargs: Any) -> EvaluationResult:
        if isinstance(self._outcome, TrialFailedError):
            raise self._outcome
        return self._outcome

    # Callbacks are told the arguments by DSPy's names for them.
    _replay.__dict__["__signature__"] = inspect.signature(dspy.Evaluate.__call__)
    __call__ = with_callbacks(_replay)


def _scores_of(trial: FrozenTrial) -> dict[int, float]:
    """Example to score; empty for a trial that is not told."""
    scores = trial.user_attrs.get(SCORES, ())
    return dict(zip(trial.user_attrs[EXAMPLES], scores, strict=True)) if scores else {}


def _listens(callback: Any) -> bool:
    """Whether evaluations are of any interest to a callback of DSPy's."""
    return any(getattr(type(callback), name, None) is not getattr(BaseCallback, name) for name in _HANDLERS)


def _key(params: Mapping[str, int] | None) -> object:
    return None if params is None else tuple(sorted(params.items()))
