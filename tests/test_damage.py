"""Damaged studies: a search goes on without what is unreadable, or a StorageError says what that is."""

from __future__ import annotations

import logging
import math
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from damages import damaged
from optuna.trial import FrozenTrial
from test_checkpoint import _compile

from mpromptune import PromptSpace, SearchResult, search
from mpromptune.errors import StorageError, StudyMismatchError
from mpromptune.storage.attributes import (
    ANSWERS,
    DEMOS,
    EXAMPLES,
    INSTRUCTIONS,
    RESUMES,
    SCORES,
    USAGE,
    USED,
)
from mpromptune.storage.storage import open_study

SPACE = PromptSpace({"0_predictor_instruction": ["a", "b", "c"], "0_predictor_demos": [[], ["x"]]})


def _search(storage: Any) -> SearchResult:
    return search(
        SPACE,
        lambda params, example: float((params["0_predictor_instruction"] + example) % 3 == 0),
        n_examples=12,
        max_calls=50,
        sampler="random",
        num_threads=1,
        block_size=4,
        storage=storage,
    )


def _small_compile(storage: Any) -> Any:
    return _compile(storage, num_candidates=2, batch_size=2, verbose=False)[1]


def _lines(path: Path, run: Callable[[Any], Any]) -> list[bytes]:
    run(path)
    return path.read_bytes().splitlines(keepends=True)


def _outlives(path: Path, run: Callable[[Any], Any]) -> bool:
    """Whether a run ends with a result; the only other end is an error that names the file or the study."""
    try:
        return run(path) is not None
    except (StorageError, StudyMismatchError) as error:
        return not _names(path, str(error))


def _names(path: Path, message: str) -> bool:
    assert str(path) in message or "study 'mpromptune'" in message, message
    return True


def test_a_search_outlives_damage(tmp_path: Path) -> None:
    """Two dozen journals damaged at random: most go on, and none ends in an error of another kind."""
    lines = _lines(tmp_path / "whole", _search)
    ended = []
    for seed in range(24):
        path = tmp_path / f"{seed}"
        path.write_bytes(damaged(lines, seed))
        ended.append(_outlives(path, _search))
    assert sum(ended) > 12


def test_a_compile_outlives_damage(tmp_path: Path) -> None:
    """The same with all that a compile keeps."""
    lines = _lines(tmp_path / "whole", _small_compile)
    for seed in range(5):
        path = tmp_path / f"{seed}"
        path.write_bytes(damaged(lines, seed))
        _outlives(path, _small_compile)


def _with(study: optuna.Study, number: int, change: Callable[[FrozenTrial], None]) -> optuna.Study:
    """A copy in memory in which one trial is changed."""
    copied = optuna.create_study(study_name=study.study_name, direction="maximize")
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, value)
    for trial in study.trials:
        if trial.number == number:
            change(trial)
        copied._storage.create_new_trial(copied._study_id, template_trial=trial)
    return copied


def _attribute(name: str, value: Any) -> Callable[[FrozenTrial], None]:
    def change(trial: FrozenTrial) -> None:
        trial._user_attrs[name] = value

    return change


def _without(name: str) -> Callable[[FrozenTrial], None]:
    def change(trial: FrozenTrial) -> None:
        del trial._user_attrs[name]

    return change


def _score(value: float) -> Callable[[FrozenTrial], None]:
    def change(trial: FrozenTrial) -> None:
        trial.intermediate_values[next(iter(trial.intermediate_values))] = value

    return change


def _lose_param(trial: FrozenTrial) -> None:
    for kept in (trial._params, trial._distributions):
        del kept["0_predictor_demos"]


def _other_choices(trial: FrozenTrial) -> None:
    trial._distributions["0_predictor_demos"] = optuna.distributions.CategoricalDistribution(range(9))
    trial._params["0_predictor_demos"] = 8


WRONG = {
    "examples out of range": _attribute(EXAMPLES, [99]),
    "examples of a wrong type": _attribute(EXAMPLES, "0"),
    "scores of a wrong type": _attribute(SCORES, [None] * 4),
    "NaN among the scores": _attribute(SCORES, [float("nan")] * 4),
    "fewer scores than examples": _attribute(SCORES, [1.0]),
    "usage that was cut": _attribute(USAGE, '{"lm_calls": 1'),
    "usage of a wrong type": _attribute(USAGE, "[1]"),
    "going on with itself": _attribute(RESUMES, 2),
    "NaN as a score": _score(float("nan")),
    "a param out of range": _other_choices,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_values_name_their_trial(change: Any) -> None:
    """In any storage, before a call is made."""
    study = _with(_search(None).study, 2, change)
    with pytest.raises(StorageError, match="Trial 2 of the study 'mpromptune' is damaged"):
        _search(study._storage)


# What Optuna itself cannot read, in one row of each table of a database.
ROWS = {
    "an attribute": "UPDATE trial_user_attributes SET value_json = '['",
    "a score": "UPDATE trial_values SET value = NULL",
    "a param": "UPDATE trial_params SET param_value = 99",
    "its choices": "UPDATE trial_params SET distribution_json = '{}'",
    "a state": "UPDATE trials SET state = 'LOST'",
}


@pytest.fixture(scope="module", params=[_search, _small_compile])
def in_database(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[[Any], Any], Path]:
    """A run, and a database that holds it."""
    path = tmp_path_factory.mktemp("whole") / "run.db"
    request.param(f"sqlite:///{path}")
    return request.param, path


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_damaged_rows_of_a_database(change: str, in_database: Any, tmp_path: Path) -> None:
    """A search, and a compile, end with an error that names the study and its file."""
    run, path = in_database[0], tmp_path / "run.db"
    shutil.copy(in_database[1], path)
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(f"{change} WHERE trial_id = 2").rowcount
    with pytest.raises(StorageError, match=re.escape(str(path))):
        run(f"sqlite:///{path}")


LOST = {"examples": _without(EXAMPLES), "scores": _without(SCORES), "a param": _lose_param}


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
def test_a_search_goes_on_without_what_is_lost(change: Any) -> None:
    """It ends with a result, for which every score is there."""
    study = _with(_search(None).study, 2, change)
    result = _search(study._storage)
    assert math.isfinite(result.best_score)
    assert result.calls <= 50


KEPT = (DEMOS, INSTRUCTIONS, f"{DEMOS}:0:1", f"{USED}:bootstrap", ANSWERS)


@pytest.mark.parametrize("value", [None, "x", {"parts": ["0:0"], "rng": "x"}], ids=repr)
def test_damaged_steps_are_made_again(value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A compile ends with the same program, whichever of the attributes before its search is damaged."""
    path = tmp_path / "run.log"
    expected = _small_compile(None).dump_state()
    _small_compile(path)
    study = open_study(path)
    for name in study.user_attrs:
        if name in KEPT or name.startswith(f"{ANSWERS}:search"):
            study.set_user_attr(name, value)
    with caplog.at_level(logging.WARNING):
        assert _small_compile(path).dump_state() == expected
