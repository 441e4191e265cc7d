"""Turns failures of a storage into a StorageError: it cannot be reached, or its data are damaged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpromptune.errors import MPromptuneError, StorageError
from mpromptune.execution.usage import Usage
from mpromptune.storage.attributes import EXAMPLES, PLANNED, RESUMES, SCORES, USAGE

# Errors that values of the wrong kind cause, here or when Optuna replays a journal.
CRASHES = (AssertionError, AttributeError, LookupError, TypeError, ValueError, OverflowError)


_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@\s]*@")


@contextmanager
def reported(what: str = "The storage cannot be read and written") -> Iterator[None]:
    """Raise errors of the system or of an Optuna storage as a `StorageError` that begins with ``what``."""
    try:
        yield
    except StorageError:
        raise
    except (StorageInternalError, OSError) as error:
        # Optuna's message does not name the cause, and SQLAlchemy's contains all data to be written.
        cause = getattr(error.__cause__, "orig", None) or getattr(error, "strerror", None) or error
        raise StorageError(f"{what}: {public(cause)}. Its data are kept.") from error


def public(text: object) -> str:
    """A message without passwords of URLs."""
    return _PASSWORD.sub(r"\1:***@", str(text))


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise an error caused by data of a storage as a `StorageError` that says what is damaged."""
    try:
        yield
    except MPromptuneError:
        raise
    except CRASHES as error:
        raise StorageError(
            f"{what} is damaged and cannot be read ({type(error).__name__}: {error}). Repair it, or pass "
            "another storage or study_name. Nothing was written to it."
        ) from error


def named(study: Study) -> str:
    """The name of a study and, if it has one, its file or the URL of its database without the password."""
    backend = getattr(study._storage, "_backend", None)
    url = getattr(getattr(backend, "engine", None), "url", None)
    place = getattr(backend, "_file_path", url)
    return f"the study {study.study_name!r}" + (f" in {place}" if place else "")


def require_readable(study: Study, distributions: Mapping[str, BaseDistribution], n_examples: int) -> None:
    """Check that the trials of a study contain valid data of a search of this space.

    Missing data are not damage, because a search continues without them.

    Raises:
        StorageError: A trial contains other data; the message names the trial.
    """
    with readable(f"A trial of {named(study)}"):
        trials = study.get_trials(deepcopy=False)
    for trial in trials:
        with readable(f"Trial {trial.number} of {named(study)}"):
            _check_numbers(trial, n_examples)
            for usage in (v for name, v in trial.user_attrs.items() if name.startswith(USAGE)):
                usage_from(json.loads(usage))
            for name, value in trial.params.items():
                if name in distributions and trial.distributions[name] != distributions[name]:
                    raise ValueError(f"{name} = {value!r} of {trial.distributions[name]}")


def _check_numbers(trial: FrozenTrial, n_examples: int) -> None:
    attributes = trial.user_attrs
    examples, scores, planned = (
        list_from(name, attributes.get(name, [])) for name in (EXAMPLES, SCORES, PLANNED)
    )
    for example in (*examples, *planned, *trial.intermediate_values):
        _check_index("an example", example, n_examples)
    is_told = trial.state == TrialState.COMPLETE
    told: Any = trial.values if is_told else ()
    if len(told) != is_told:
        raise ValueError(f"its values are {told!r}")
    for score in (*scores, *trial.intermediate_values.values(), *told):
        if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
            raise ValueError(f"a score is {score!r}")
    if {EXAMPLES, SCORES} <= attributes.keys() and len(examples) != len(scores):
        raise ValueError(f"there are {len(examples)} examples, and {len(scores)} scores")
    if RESUMES in attributes:
        _check_index(RESUMES, attributes[RESUMES], trial.number)


def usage_from(kept: Any) -> Usage:
    """The usage that `Usage.as_dict` has saved.

    Raises:
        TypeError: ``kept`` is something else.
    """
    usage = Usage(**kept)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in kept.values()):
        raise TypeError(f"the usage is {kept!r}")
    return usage


def list_from(name: str, value: Any) -> list[Any]:
    """``value`` as a list.

    Raises:
        TypeError: It is neither a list nor a tuple.
    """
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is {value!r}")
    return list(value)


def _check_index(name: str, value: Any, size: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise ValueError(f"{name} is {value!r}, not one of 0 to {size - 1}")
