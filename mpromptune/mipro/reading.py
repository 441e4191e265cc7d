"""Reads a study alone: the result of its search, and the state of its compile."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study

from mpromptune.engine.result import SearchResult
from mpromptune.engine.settings import recorded_settings
from mpromptune.engine.summary import result_of_study
from mpromptune.engine.trials import table_of
from mpromptune.errors import InvalidArgumentError, StudyMismatchError
from mpromptune.execution.limits import PROPOSE
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.checkpoint import kept_usage, read_candidates
from mpromptune.mipro.estimate import WRITING, Estimate
from mpromptune.model.space import Candidate, PromptSpace
from mpromptune.operators.texts import candidate_text, demo_text
from mpromptune.storage.attributes import DEMOS, ESTIMATE, FORMAT, INSTRUCTIONS, PREDICTORS, SETTINGS
from mpromptune.storage.damage import list_from, named, readable, reported, usage_from
from mpromptune.storage.proposals import read_proposals
from mpromptune.storage.record import Record, read_record
from mpromptune.storage.storage import (
    DEFAULT_STUDY_NAME,
    StorageSpec,
    check_storage,
    open_storage,
    require_ours,
)

_COMPONENT = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
_KINDS = {"instruction": INSTRUCTIONS, "demos": DEMOS}
_OWN = "(the program's own, whose text the study does not keep)"
_UNKNOWN = "(a text that the study does not keep, number {})"


def read_result(storage: StorageSpec, study_name: str | None = None) -> tuple[SearchResult, tuple[str, ...]]:
    """The result of a search from its study; nothing is written, and no LM is called.

    Args:
        storage: The ``storage`` of the search.
        study_name: Name of the study; by default that of the only study in the storage.

    Returns:
        The result, and notes on what is unknown or only estimated in it, one or two sentences each.

    Raises:
        InvalidArgumentError: The storage or the study does not exist, or has no scores yet.
        StorageError: The storage cannot be read.
        StudyMismatchError: The study was not made by a search of this format version.
    """
    return result_of(load_study(storage, study_name))


def result_of(study: Study) -> tuple[SearchResult, tuple[str, ...]]:
    """Like `read_result`, for a loaded study."""
    with reported(), readable(f"The record of {named(study)}"):
        _check_described(study)
        return _result_of(study)


def _result_of(study: Study) -> tuple[SearchResult, tuple[str, ...]]:
    settings, record = recorded_settings(study), read_record(study)
    usage = _used(study, record)
    if not settings:
        raise InvalidArgumentError(
            f"No search has begun in the study {study.study_name!r} yet: run the compile first."
        )
    texts = {name: _texts(study, name, settings["candidates"][name][0]) for name in settings["components"]}
    unknown = [name for name, (_, is_complete) in texts.items() if not is_complete]
    space = PromptSpace({name: found for name, (found, _) in texts.items()})
    has_texts = len(unknown) < len(texts) or any(_OWN in found for found, _ in texts.values())
    table = table_of(record, space, int(settings["arguments"]["n_examples"]))
    result = result_of_study(study, settings["arguments"], table, space, _text_of)
    if result is None:
        raise InvalidArgumentError(
            f"Nothing has been measured in the study {study.study_name!r} yet: wait for its first trial."
        )
    return replace(result, usage=usage, space=space if has_texts else None), _notes(unknown)


def _check_described(study: Study) -> None:
    """Read what a report needs besides the search, so that damaged data raise an error here."""
    list_from(PREDICTORS, study.user_attrs.get(PREDICTORS, []))
    for used in study.user_attrs.get(ESTIMATE, {}).values():
        usage_from(used)


def load_study(storage: StorageSpec, study_name: str | None = None) -> Study:
    """Load the study of a search without writing to its storage; see `read_result`."""
    check_storage(storage, study_name)
    with reported():
        return _load(storage, study_name)


def _load(storage: StorageSpec, study_name: str | None) -> Study:
    if isinstance(storage, str | os.PathLike):
        path = os.fspath(storage)
        if "://" not in path and not Path(path).is_file():  # opening it would create a file
            raise InvalidArgumentError(
                f"There is no journal file {path!r}. Pass the path or URL that the compile has as storage=."
            )
    opened = open_storage(storage)
    names = [study.study_name for study in opened.get_all_studies()]
    name = names[0] if study_name is None and len(names) == 1 else study_name
    if not names:
        raise InvalidArgumentError("The storage has no study yet: run a compile with it first.")
    if name not in names:
        asked = "several studies" if study_name is None else f"no study {study_name!r}"
        raise InvalidArgumentError(f"The storage has {asked}; pass the name of one of {names}.")
    study = optuna.load_study(study_name=name, storage=opened)
    if SETTINGS not in study.user_attrs and FORMAT not in study.user_attrs:
        raise StudyMismatchError(
            f"The study {name!r} was not made by a search. Pass study_name, one of {names}."
        )
    require_ours(study)
    return study


def _texts(study: Study, component: str, count: int) -> tuple[list[Candidate], bool]:
    """The texts of the candidates of a component, and whether all are known."""
    match = _COMPONENT.match(component)
    kind = _KINDS[match[2]] if match else None
    found: list[Any] = []
    if match is not None and kind in study.user_attrs:
        for candidate in read_candidates(study.user_attrs, kind)[int(match[1])]:
            if candidate not in found:
                found.append(candidate)
    texts = [*map(candidate_text, found)]
    if len(texts) == count:
        return texts, True
    if len(texts) == count - 1:  # a compile adds the student's own candidate unless one equals it
        return [*texts, _OWN], False
    return [_UNKNOWN.format(i) for i in range(count)], False


def _text_of(written: Any) -> Candidate:
    """The text or texts of a candidate that was written during a search, as it is saved."""
    if isinstance(written, str):
        return written
    return [demo if isinstance(demo, str) else demo_text(demo) for demo in written]


def _used(study: Study, record: Record) -> StepUsage:
    """The usage of each step; that of the search is the sum over its trials."""
    steps = kept_usage(study.user_attrs)
    written = sum((one.usage for one in read_proposals(study)), Usage())
    if PROPOSE in steps or written != Usage():
        steps[PROPOSE] = steps.get(PROPOSE, Usage()) + written
    search = sum((recorded.usage for recorded in record), Usage())
    return StepUsage(steps, search=search)


def _notes(unknown: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "This page was made from the study alone. Its estimates are from a model without the texts, and may "
        "differ from those of the search; the winner is the one that the search would return if it ended "
        "now with the winner confirmed.",
    ]
    if unknown:
        notes.append(
            f"Some texts of {', '.join(unknown)} are not kept in the study; a report of the result itself "
            "(result.report) has them."
        )
    return tuple(notes)


# The attribute that a study has when a step has ended.
_STEPS = {"bootstrap": DEMOS, "propose": INSTRUCTIONS}


@dataclass(frozen=True)
class Standing:
    """The state of a compile, from its study.

    Attributes:
        study: The study.
        done: Steps that have ended and will not be paid for again.
        used: Usage of each step.
        trials: Number of told trials of the search.
        calls: Number of scores of the search.
        result: The result so far; None without scores.
    """

    study: Study
    done: frozenset[str]
    used: StepUsage
    trials: int
    calls: int
    result: SearchResult | None

    def left(self, estimate: Estimate) -> StepUsage:
        """The most that each step may still use.

        Args:
            estimate: The estimate of the whole compile.
        """
        whole = estimate.usage
        left = {step: Usage() if step in self.done else whole[step] for step in whole}
        search = whole["search"]
        calls = max(search.program_calls - self.calls, 0)
        each = search.lm_calls // max(search.program_calls, 1)
        left["search"] = replace(search, program_calls=calls, lm_calls=calls * each)
        if WRITING in left:  # each of its requests takes the place of a program call
            left[WRITING] = replace(left[WRITING], lm_calls=min(left[WRITING].lm_calls, calls))
        return StepUsage(left)


def read_standing(storage: StorageSpec, study_name: str | None = None) -> Standing:
    """The state of a compile from its storage; nothing is written.

    Args:
        storage: The ``storage`` of the compile.
        study_name: The ``study_name`` of the compile.

    Raises:
        InvalidArgumentError: The storage or the study does not exist.
        StorageError: The storage cannot be read.
        StudyMismatchError: The study was not made by a compile of this format version.
    """
    study = load_study(storage, study_name or DEFAULT_STUDY_NAME)
    with reported(), readable(f"The record of {named(study)}"):
        record = read_record(study)
        used = _used(study, record)
    scores = sum(len(recorded.scores) for recorded in record)
    return Standing(
        study=study,
        done=frozenset(step for step, key in _STEPS.items() if key in study.user_attrs),
        used=used,
        trials=sum(recorded.told for recorded in record),
        calls=scores,
        result=result_of(study)[0] if scores else None,
    )
