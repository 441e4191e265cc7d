"""The statistics that DSPy's MIPROv2 attaches to the program it returns, from a SearchResult."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dspy.teleprompt.utils import save_candidate_program
from optuna.trial import FrozenTrial, TrialState

from mpromptune.engine.result import Measured, SearchResult
from mpromptune.execution.usage import Usage
from mpromptune.mipro.configurations import ProgramSpace
from mpromptune.storage.attributes import EXAMPLES, SCORES

logger = logging.getLogger(__name__)

Build = Callable[[Mapping[str, int]], Any]

# What makes a compiled program heavy; each entry holds programs of its own.
_STATISTICS = ("trial_logs", "candidate_programs", "mb_candidate_programs", "search_result")


def forget_statistics(program: Any) -> None:
    """Takes off what an earlier compile attached, or every candidate would carry a copy of it."""
    for name in _STATISTICS:
        program.__dict__.pop(name, None)


def attach_statistics(best: Any, programs: ProgramSpace, result: SearchResult, log_dir: str | None) -> None:
    """Sets ``score``, ``trial_logs``, ``candidate_programs`` and ``mb_candidate_programs``.

    Scores are percentages, as DSPy's are. One program object serves all entries of a configuration.
    """
    build = _memoised(programs.build)
    best.score = percent(result.best_score)
    best.trial_logs = trial_logs(result, build, log_dir)
    best.candidate_programs = _ranked(
        [_entry(build(m.params), m.mean, True) for m in result.configurations if m.fully]
    )
    best.mb_candidate_programs = _ranked(
        [_entry(build(t.params), _mean(t), False) for t in _completed(result) if _is_partial(t, result)]
    )
    best.total_calls = result.calls
    best.prompt_model_total_calls = result.usage.get("propose", Usage()).lm_calls


def trial_logs(result: SearchResult, build: Build, log_dir: str | None) -> dict[int, dict[str, Any]]:
    """DSPy's log of every completed trial: numbered from 1, in the order in which they were asked.

    A trial on all examples is logged as a full evaluation; where none completes a configuration by
    itself, its last trial is, with the score over all examples; every other one as a minibatch. With
    ``log_dir``, each program is saved there.
    """
    full = {_key(m.params): m for m in result.configurations if m.fully}
    last = _last_evaluations(result)
    logs: dict[int, dict[str, Any]] = {}
    calls = 0
    completed = {trial.number for trial in _completed(result)}
    for trial in result.study.get_trials(deepcopy=False):
        calls += len(trial.user_attrs.get(SCORES, ()))
        if trial.number not in completed:
            continue
        closes = last[_key(trial.params)] == trial.number
        whole = full.get(_key(trial.params)) if closes else None
        logs[trial.number + 1] = {
            **trial.params,
            **_evaluation(trial, build(trial.params), whole, log_dir),
            "total_eval_calls_so_far": calls,
        }
    return logs


def percent(score: float) -> float:
    """A score as DSPy prints it."""
    return round(100.0 * score, 2)


def _evaluation(
    trial: FrozenTrial, program: Any, whole: Measured | None, log_dir: str | None
) -> dict[str, Any]:
    kind, score = ("mb", _mean(trial)) if whole is None else ("full_eval", whole.mean)
    note = None if whole is None else "full_eval"
    return {
        f"{kind}_score": percent(score),
        f"{kind}_program": program,
        f"{kind}_program_path": _saved(program, log_dir, trial.number + 1, note),
    }


def _saved(program: Any, log_dir: str | None, number: int, note: str | None) -> str | None:
    """Where the program was saved; a program that cannot be does not cost the whole search."""
    try:
        path: str | None = save_candidate_program(program, log_dir, number, note)
    except Exception as error:  # noqa: BLE001 - whatever the demos' own serialisation raises
        logger.warning("The program of trial %d could not be saved: %s", number, error)
        return None
    return path


def _mean(trial: FrozenTrial) -> float:
    assert trial.value is not None  # only completed trials come here
    return trial.value


def _last_evaluations(result: SearchResult) -> dict[tuple[tuple[str, int], ...], int]:
    """Configuration to the trial that completes it: the last one, or the last on all examples."""
    trials = _completed(result)
    whole = [t for t in trials if not _is_partial(t, result)]
    return {_key(t.params): t.number for t in (*trials, *whole)}


def _is_partial(trial: FrozenTrial, result: SearchResult) -> bool:
    return len(trial.user_attrs[EXAMPLES]) < result.n_examples


def _completed(result: SearchResult) -> list[FrozenTrial]:
    trials = result.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # A damaged storage may have lost what a trial was of.
    return [t for t in trials if EXAMPLES in t.user_attrs and t.params.keys() == result.best_params.keys()]


def _key(params: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(params.items()))


def _memoised(build: Build) -> Build:
    built: dict[tuple[tuple[str, int], ...], Any] = {}

    def once(params: Mapping[str, int]) -> Any:
        key = _key(params)
        if key not in built:
            built[key] = build(params)
        return built[key]

    return once


def _entry(program: Any, score: float, full_eval: bool) -> dict[str, Any]:
    return {"score": percent(score), "program": program, "full_eval": full_eval}


def _ranked(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: -entry["score"])
