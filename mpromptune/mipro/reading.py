"""What a study alone says: the result of its search, and where the compile stands that it was made by."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study

from mpromptune.engine.knowledge import Knowledge
from mpromptune.engine.result import Measured, SearchResult
from mpromptune.engine.settings import recorded_settings
from mpromptune.errors import InvalidArgumentError, StudyMismatchError
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.checkpoint import kept_usage, read_candidates
from mpromptune.mipro.configurations import candidate_text
from mpromptune.mipro.estimate import Estimate
from mpromptune.model.space import Candidate, PromptSpace, Row
from mpromptune.sampling.encoding import encode_prompts
from mpromptune.storage.attributes import DEMOS, FORMAT, INSTRUCTIONS, SETTINGS, STUDENT
from mpromptune.storage.damage import reported
from mpromptune.storage.ledger import Ledger
from mpromptune.storage.record import Record, read_record
from mpromptune.storage.storage import DEFAULT_STUDY_NAME, StorageSpec, check_storage, open_storage

_COMPONENT = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
_KINDS = {"instruction": INSTRUCTIONS, "demos": DEMOS}
_OWN = "(the program's own, whose text the study does not keep)"
_UNKNOWN = "(a text that the study does not keep, number {})"


def read_result(storage: StorageSpec, study_name: str | None = None) -> tuple[SearchResult, tuple[str, ...]]:
    """What can be said of a search from its study; nothing is written to it, and no LM is asked.

    Args:
        storage: As `mpromptune.search` was given it.
        study_name: By default that of the only study there.

    Returns:
        The result, and what is not known or only estimated in it, a sentence each.

    Raises:
        InvalidArgumentError: There is no such storage, no such study, or nothing in it yet.
        StorageError: The storage cannot be read.
        StudyMismatchError: The study is none of a search of this version.
    """
    return result_of(load_study(storage, study_name))


def result_of(study: Study) -> tuple[SearchResult, tuple[str, ...]]:
    """As `read_result`, of a study that has been loaded."""
    with reported():
        settings = recorded_settings(study)
        record = read_record(study)
        steps = steps_used(study, record)
    if not settings:
        raise InvalidArgumentError(f"No search has begun in the study {study.study_name!r} yet.")
    space, unknown = _space(study, settings)
    return _result(study, settings, record, space, steps), _notes(unknown)


def load_study(storage: StorageSpec, study_name: str | None = None) -> Study:
    """The study of a search, without writing to its storage; arguments and errors as in `read_result`."""
    check_storage(storage, study_name)
    with reported():
        return _load(storage, study_name)


def _load(storage: StorageSpec, study_name: str | None) -> Study:
    if isinstance(storage, str | os.PathLike):
        path = os.fspath(storage)
        if "://" not in path and not Path(path).is_file():  # opening it would make one
            raise InvalidArgumentError(f"There is no journal file {path!r}.")
    opened = open_storage(storage)
    names = [study.study_name for study in opened.get_all_studies()]
    name = names[0] if study_name is None and len(names) == 1 else study_name
    if name not in names:
        asked = "several studies" if study_name is None else f"no study {study_name!r}"
        asked = asked if names else "no study"
        raise InvalidArgumentError(f"The storage has {asked}; give the name of one of {names}.")
    study = optuna.load_study(study_name=name, storage=opened)
    if SETTINGS not in study.user_attrs and FORMAT not in study.user_attrs:
        raise StudyMismatchError(f"The study {name!r} was made by no search.")
    return study


def _space(study: Study, settings: Mapping[str, Any]) -> tuple[PromptSpace, list[str]]:
    """The candidates, and the names of components of which texts are missing."""
    components: dict[str, Sequence[Candidate]] = {}
    unknown = []
    for name in settings["components"]:
        count = settings["candidates"][name][0]
        known = _candidates(study, name)
        if len(known) == count - 1:  # a compile adds the student's own where no candidate equals it
            known = [*known, _OWN]
        if len(known) != count or _OWN in known:
            unknown.append(name)
        components[name] = known if len(known) == count else [_UNKNOWN.format(i) for i in range(count)]
    return PromptSpace(components), unknown


def _candidates(study: Study, component: str) -> list[Candidate]:
    """What the steps of a compile ended with, each once; nothing after a plain search."""
    match = _COMPONENT.match(component)
    kind = _KINDS[match[2]] if match else None
    if match is None or kind not in study.user_attrs:
        return []
    found: list[Any] = []
    for candidate in read_candidates(study.user_attrs, kind)[int(match[1])]:
        if candidate not in found:
            found.append(candidate)
    return [*map(candidate_text, found)]


def _result(
    study: Study, settings: Mapping[str, Any], record: Record, space: PromptSpace, usage: StepUsage
) -> SearchResult:
    arguments = settings["arguments"]
    n_examples, baseline = int(arguments["n_examples"]), space.row(arguments["baseline"])
    known = Knowledge(study, encode_prompts(space, None), n_examples, ledger=_ledger(record, space))
    ranked = known.best_first(known.ledger.rows())
    if not ranked:
        raise InvalidArgumentError(f"Nothing has been measured in the study {study.study_name!r} yet.")
    whole = _whole(known.ledger, record, space, n_examples, arguments["schedule"])
    best = _winner(known.ledger, ranked, whole, baseline, n_examples, arguments["schedule"])
    means, deviations = known.posterior(ranked)
    posterior = zip(ranked, means.tolist(), deviations.tolist(), strict=True)
    return SearchResult(
        best_params=space.params(best),
        best_score=known.ledger.mean(best),
        baseline_score=known.ledger.mean(baseline),
        calls=known.ledger.calls,
        n_examples=n_examples,
        configurations=tuple(
            Measured(space.params(row), known.ledger.means(row), mean, deviation, row in whole)
            for row, mean, deviation in posterior
        ),
        study=study,
        usage=usage,
        drawn=known.drawn() if arguments.get("combinations") is None else None,
        space=space if any(_candidates(study, name) for name in space.names) else None,
    )


def _ledger(record: Record, space: PromptSpace) -> Ledger:
    """All scores; what a failed candidate counts is only known once its trial has been told."""
    ledger = Ledger()
    for recorded in record:
        if len(recorded.params) == len(space.names):
            row = space.row(recorded.params)
            ledger.add(row, recorded.scores, lost=recorded.lost, refused=recorded.refused)
    return ledger


def _whole(
    ledger: Ledger, record: Record, space: PromptSpace, n_examples: int, schedule: str
) -> dict[Row, None]:
    """What counts as fully measured, as the plan of the search has it; in the order of trials."""
    if schedule != "mipro":
        return {row: None for row in ledger.rows() if ledger.covers(row, n_examples)}
    return {space.row(r.params): None for r in record if r.told and len(r.scores) == n_examples}


def _winner(
    ledger: Ledger,
    ranked: Sequence[Row],
    whole: Mapping[Row, None],
    baseline: Row,
    n_examples: int,
    schedule: str,
) -> Row:
    if schedule == "mipro" and whole.keys() - {baseline}:
        return max(whole, key=ledger.mean)
    return ledger.best_so_far(ranked, baseline, n_examples)


def steps_used(study: Study, record: Record) -> StepUsage:
    """What each step of a compile has used, the search by its trials."""
    search = sum((recorded.usage for recorded in record), Usage())
    return StepUsage(kept_usage(study.user_attrs), search=search)


def _notes(unknown: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "This page was made from the study alone. Estimates are those of a model that knows nothing of "
        "the texts, and may differ from those of the search; the winner is the one that it would return "
        "if it ended now with the winner confirmed.",
    ]
    if unknown:
        notes.append(
            f"Some texts of {', '.join(unknown)} are not kept in the study; a report of the result itself "
            "(result.report) has them."
        )
    return tuple(notes)


# What a study has of a step once that has ended.
_STEPS = {"bootstrap": DEMOS, "propose": INSTRUCTIONS}


@dataclass(frozen=True)
class Standing:
    """What a study holds of a compile.

    Attributes:
        study: Its study.
        done: Steps that have ended and are not paid again.
        used: What each step has used.
        trials: Trials of the search that are over.
        calls: Scores that the search has, or can take from the student's, which were measured before it.
        result: What would be the result now; None before anything is measured.
    """

    study: Study
    done: frozenset[str]
    used: StepUsage
    trials: int
    calls: int
    result: SearchResult | None

    def left(self, estimate: Estimate) -> StepUsage:
        """What each step has yet to use, at most.

        Args:
            estimate: Of the whole compile.
        """
        whole = estimate.usage
        left = {step: Usage() if step in self.done else whole[step] for step in whole}
        search = whole["search"]
        calls = max(search.program_calls - self.calls, 0)
        each = search.lm_calls // max(search.program_calls, 1)
        left["search"] = replace(search, program_calls=calls, lm_calls=calls * each)
        return StepUsage(left)


def read_standing(storage: StorageSpec, study_name: str | None = None) -> Standing:
    """Where the compile stands whose ``storage`` this was; nothing is written to it.

    Args:
        storage: As ``compile`` was given it.
        study_name: As well.

    Raises:
        InvalidArgumentError: There is no such storage, or no such study.
        StorageError: The storage cannot be read.
        StudyMismatchError: The study is none of a compile of this version.
    """
    study = load_study(storage, study_name or DEFAULT_STUDY_NAME)
    with reported():
        kept, record = study.user_attrs, read_record(study)
        ahead = _scored_ahead(study, record)
    used = steps_used(study, record)
    used["search"] = sum(ahead, used["search"])
    scores = sum(len(recorded.scores) for recorded in record)
    return Standing(
        study=study,
        done=frozenset(step for step, key in _STEPS.items() if key in kept),
        used=used,
        trials=sum(recorded.told for recorded in record),
        calls=scores + len(ahead),
        result=result_of(study)[0] if scores else None,
    )


def _scored_ahead(study: Study, record: Record) -> list[Usage]:
    """What the student's scores took that are known, but not yet to the search."""
    prefix = f"{STUDENT}:"
    known = {int(k.removeprefix(prefix)): v for k, v in study.user_attrs.items() if k.startswith(prefix)}
    settings = recorded_settings(study)
    baseline = settings["arguments"]["baseline"] if settings else None
    taken = {example for r in record if r.params == baseline for example in r.scores}
    return [Usage(**outcome["usage"]) for example, outcome in known.items() if example not in taken]
