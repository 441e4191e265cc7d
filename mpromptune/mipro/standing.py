"""Where an interrupted compile stands: what is paid for, and what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optuna.study import Study

from mpromptune.engine.result import SearchResult
from mpromptune.engine.settings import recorded_settings
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.estimate import Estimate
from mpromptune.mipro.reading import load_study, result_of, steps_used
from mpromptune.storage.attributes import DEMOS, INSTRUCTIONS, STUDENT
from mpromptune.storage.record import Record, read_record
from mpromptune.storage.storage import DEFAULT_STUDY_NAME, StorageSpec, reported

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
