"""The results of a search in DSPy's form: statistics of the program, and evaluations for callbacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.teleprompt.utils import save_candidate_program
from dspy.utils.callback import BaseCallback, with_callbacks
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpromptune.engine.result import SearchResult
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import TrialFailedError
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.usage import Usage
from mpromptune.mipro.configurations import ProgramSpace
from mpromptune.storage.attributes import EXAMPLES, PLANNED, PROPOSAL, SCORES
from mpromptune.storage.proposals import from_json

logger = logging.getLogger(__name__)

# Attributes that make a compiled program large, because they contain programs.
_STATISTICS = ("trial_logs", "candidate_programs", "mb_candidate_programs", "search_result")

_Key = tuple[tuple[str, int], ...]


def percent(score: float | None) -> float:
    """A score in percent, as DSPy prints it."""
    assert score is not None  # it is only called for completed trials
    return round(100.0 * score, 2)


def forget_statistics(program: Any) -> None:
    """Remove the statistics of an earlier compile, which every candidate would copy otherwise."""
    for name in _STATISTICS:
        program.__dict__.pop(name, None)


def attach_statistics(best: Any, programs: ProgramSpace, result: SearchResult, optimizer: Any) -> None:
    """Set the statistics of MIPROv2 (``score``, ``trial_logs`` and so on), if the ``optimizer`` wants them.

    Scores are in percent, as in DSPy. All entries of a configuration share one program object.
    """
    if not (optimizer.track_stats or optimizer.log_dir):
        return
    build = lru_cache(maxsize=None)(lambda key: programs.build(dict(key)))
    logs = _logs(result, build, optimizer.log_dir)
    if not optimizer.track_stats:
        return
    parts = [t for t in _completed(result) if len(t.user_attrs[EXAMPLES]) < result.n_examples]
    best.score = percent(result.best_score)
    best.trial_logs = logs
    best.candidate_programs = _ranked(
        (m.mean, build(_key(m.params)), True) for m in result.configurations if m.fully
    )
    best.mb_candidate_programs = _ranked((t.value, build(_key(t.params)), False) for t in parts)
    best.total_calls = result.calls
    best.prompt_model_total_calls = result.usage.get("propose", Usage()).lm_calls


def _logs(result: SearchResult, build: Any, log_dir: str | None) -> dict[int, dict[str, Any]]:
    """DSPy's log of all completed trials, numbered from 1 in the order in which they were asked.

    A trial on all examples is logged as a full evaluation. If a fully measured configuration has no such
    trial, its last trial is logged as one, with the score over all examples. Other trials are minibatches.
    """
    full = {_key(m.params): m.mean for m in result.configurations if m.fully}
    completed = _completed(result)
    whole = [t for t in completed if len(t.user_attrs[EXAMPLES]) == result.n_examples]
    last = {_key(trial.params): trial.number for trial in (*completed, *whole)}
    numbers = {trial.number for trial in completed}
    logs: dict[int, dict[str, Any]] = {}
    calls = 0
    for trial in result.study.get_trials(deepcopy=False):
        calls += len(trial.user_attrs.get(SCORES, ()))
        if trial.number not in numbers:
            continue
        key = _key(trial.params)
        is_full = last[key] == trial.number and key in full
        kind, score = ("full_eval", full[key]) if is_full else ("mb", trial.value)
        logs[trial.number + 1] = {
            **trial.params,
            f"{kind}_score": percent(score),
            f"{kind}_program": (program := build(key)),
            f"{kind}_program_path": _saved(program, log_dir, trial.number + 1, kind),
            "total_eval_calls_so_far": calls,
        }
    return logs


def _saved(program: Any, log_dir: str | None, number: int, kind: str) -> str | None:
    """The path of the saved program; None if it cannot be saved, which must not end the compile."""
    try:
        note = "full_eval" if kind == "full_eval" else None
        path: str | None = save_candidate_program(program, log_dir, number, note)
    except Exception as error:  # noqa: BLE001 - serialising demos may raise any error
        logger.warning("The program of trial %d could not be saved: %s", number, error)
        return None
    return path


def _completed(result: SearchResult) -> list[FrozenTrial]:
    trials = result.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # A damaged storage may have lost the params of a trial.
    return [t for t in trials if EXAMPLES in t.user_attrs and t.params.keys() == result.best_params.keys()]


def _ranked(entries: Any) -> list[dict[str, Any]]:
    rows = [
        {"score": percent(score), "program": program, "full_eval": full} for score, program, full in entries
    ]
    return sorted(rows, key=lambda entry: -entry["score"])


def _key(params: Mapping[str, int]) -> _Key:
    return tuple(sorted(params.items()))


class Evaluations:
    """Reports every trial to DSPy's callbacks as a call of ``dspy.Evaluate``, in the order of the trials.

    Callbacks expect one evaluation after another in the thread of the compile, but in a search, threads
    measure single examples, and trials overlap. So an evaluation is reported when its trial is told, and ends
    at once. As in DSPy's MIPROv2, its arguments are the program and its examples, and it returns the score in
    percent and ``(example, prediction, score)`` for each example; its metadata distinguish full evaluations
    from minibatches. A trial that completes a configuration is a full evaluation with all of its scores.
    Predictions of earlier trials are empty; a trial that lacks scores ends with a `TrialFailedError`.

    Attributes:
        programs: The configurations; None before the search.
        valset: The validation examples.
    """

    def __init__(self, metric: Any) -> None:
        self.programs: ProgramSpace | None = None
        self.valset: Sequence[Any] = ()
        self._metric = metric
        self._wanted = any(map(_listens, dspy.settings.callbacks or ()))
        self._predictions: dict[tuple[_Key, int], Any] = {}

    def keep(self, params: Mapping[str, int], example: int, prediction: Any) -> None:
        """Keep a prediction until its trial is told.

        It is called from any thread. If two trials measure one configuration on one example at the same time,
        both get the later prediction.
        """
        if self._wanted:
            self._predictions[_key(params), example] = prediction

    def on_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Report a trial that was told."""
        if not self._wanted:
            return
        assert self.programs is not None
        if PROPOSAL in trial.user_attrs and from_json(trial.user_attrs[PROPOSAL]).refused is not None:
            return  # its candidate was not written, so nothing was evaluated
        examples, outcome = self._outcome(study, trial)
        kind = "eval_full" if len(examples) == len(self.valset) else "eval_minibatch"
        evaluation = _Evaluation(outcome, devset=list(self.valset), metric=self._metric)
        devset = [self.valset[i] for i in examples]
        try:
            with deferred():  # an interrupt would leave a run of MLflow open, and that of the compile too
                program = self.programs.build(trial.params)
                evaluation(program, devset=devset, callback_metadata={"metric_key": kind})
        except TrialFailedError:
            pass  # the callbacks have received it

    def _outcome(
        self, study: Study, trial: FrozenTrial
    ) -> tuple[list[int], EvaluationResult | TrialFailedError]:
        """The examples of an evaluation, and its outcome."""
        key, kept = _key(trial.params), self._predictions
        answers = {i: kept.pop((key, i), dspy.Prediction()) for i in trial.user_attrs[EXAMPLES]}
        if trial.state != TrialState.COMPLETE:
            planned = list(trial.user_attrs[PLANNED])
            return planned, TrialFailedError(
                f"Trial {trial.number} lacks the scores of {len(planned) - len(answers)} of {len(planned)} "
                "examples because of errors that are not the program's."
            )
        scores = self._scores(study, trial)
        results = [(self.valset[i], answers.get(i, dspy.Prediction()), scores[i]) for i in scores]
        mean = sum(scores.values()) / len(scores)
        return list(scores), EvaluationResult(score=percent(mean), results=results)

    def _scores(self, study: Study, trial: FrozenTrial) -> dict[int, float]:
        """The scores of a trial; all scores of its configuration if the trial completes them."""
        n, own = len(self.valset), _scores_of(trial)
        known = ScoreTable(n)
        for other in study.get_trials(deepcopy=False):
            if other.params == trial.params and other.number != trial.number:
                known.add((), tuple(_scores_of(other)), _scores_of(other))
        was_complete = known.is_full(())
        known.add((), tuple(own), own)
        completes = known.is_full(()) and (len(own) == n or not was_complete)
        return known.means(()) if completes else own


class _Evaluation(dspy.Evaluate):
    """An evaluation that has ended; calling it only returns or raises its outcome."""

    def __init__(self, outcome: EvaluationResult | TrialFailedError, **settings: Any) -> None:
        super().__init__(**settings)
        self._outcome = outcome

    def _replay(self, *args: Any, **kwargs: Any) -> EvaluationResult:
        if isinstance(self._outcome, TrialFailedError):
            raise self._outcome
        return self._outcome

    # Callbacks get the arguments by DSPy's names.
    _replay.__dict__["__signature__"] = inspect.signature(dspy.Evaluate.__call__)
    __call__ = with_callbacks(_replay)


def _scores_of(trial: FrozenTrial) -> dict[int, float]:
    """Example to score; empty for a trial that was not told."""
    scores = trial.user_attrs.get(SCORES, ())
    return dict(zip(trial.user_attrs[EXAMPLES], scores, strict=True)) if scores else {}


def _listens(callback: Any) -> bool:
    """Whether a DSPy callback handles evaluations."""
    names = ("on_evaluate_start", "on_evaluate_end")
    return any(getattr(type(callback), name, None) is not getattr(BaseCallback, name) for name in names)
