"""What a study holds of earlier runs: trials told, trials left open, and trials that were abandoned."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from mpromptune.errors import InvalidArgumentError
from mpromptune.execution.usage import Usage
from mpromptune.storage.attributes import ABANDONED, EXAMPLES, PLANNED, REFUSED, RESUMES, SCORES, USAGE
from mpromptune.storage.findings import in_memory

Examples = tuple[int, ...]

_OPEN = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class Recorded:
    """A trial of an earlier run.

    Attributes:
        number: Its number.
        trial_id: Its identity in the storage.
        params: Its configuration; of a trial that is open, perhaps only a part.
        examples: What it was to be measured on; None for an open trial that did not get so far.
        scores: Example to score; ``failure_score`` where the candidate failed, once the trial is told.
        told: Whether it was told, and is over.
        is_open: Whether it is still running, or waiting to.
        usage: What measuring it has used.
        refused: Of those scored, the examples on which the prompt was refused.
    """

    number: int
    trial_id: int
    params: Mapping[str, int]
    examples: Examples | None
    scores: Mapping[int, float]
    told: bool
    is_open: bool
    usage: Usage = field(default_factory=Usage)
    refused: Examples = ()

    @property
    def lost(self) -> Examples:
        """What it could not be measured on."""
        return tuple(e for e in self.examples or () if e not in self.scores) if self.told else ()


Record = deque[Recorded]


def read_record(study: Study) -> Record:
    """The trials of a study in the order in which a search asked for them.

    A trial that takes up an abandoned one stands in its place. Those that were abandoned before it
    was known what to measure them on left nothing behind.
    """
    trials = study.get_trials(deepcopy=False)
    origin: dict[int, int] = {}
    for trial in trials:
        resumed = trial.user_attrs.get(RESUMES, trial.number)
        origin[trial.number] = origin.get(resumed, trial.number)
    taken_up = {trial.user_attrs.get(RESUMES) for trial in trials}
    found = [recorded_of(trial) for trial in trials if trial.number not in taken_up]
    # What a trial is of may be lost with a line of a journal, and its scores are of no use without.
    names = {name for trial in trials for name in trial.params}
    useful = [r for r in found if r.is_open or ((r.told or r.examples) and r.params.keys() >= names)]
    return deque(sorted(useful, key=lambda recorded: origin[recorded.number]))


def recorded_of(trial: FrozenTrial) -> Recorded:
    """One trial as its storage has it."""
    attributes = trial.user_attrs
    is_open = trial.state in _OPEN
    # What a storage closed by itself (a heartbeat that stopped) has no scores, and is abandoned too.
    closed = (EXAMPLES in attributes) == (SCORES in attributes)
    told = not is_open and closed and ABANDONED not in attributes
    planned = attributes.get(PLANNED, attributes.get(EXAMPLES))
    examples = tuple(planned) if planned is not None else None
    scores = dict(zip(attributes.get(EXAMPLES, ()), attributes.get(SCORES, ()), strict=False))
    if not told:  # what came in after it was closed, or has only been saved so far
        scores.update(trial.intermediate_values)
    usage = usage_of(attributes)
    refused = tuple(example for example in attributes.get(REFUSED, ()) if example in scores)
    identity = trial.number, trial._trial_id, dict(trial.params)
    return Recorded(*identity, examples, scores, told, is_open, usage, refused)


def usage_of(attributes: Mapping[str, Any]) -> Usage:
    """What a trial has used, by its attributes."""
    return Usage(**json.loads(attributes[USAGE])) if USAGE in attributes else Usage()


def check_left(record: Record, max_calls: int, missing: int) -> None:
    """Refuses a budget below what was spent and what is bound to be spent.

    Args:
        record: The trials of earlier runs; those that are not over will be measured to their end.
        max_calls: The budget.
        missing: Calls that must follow besides.

    Raises:
        InvalidArgumentError: ``max_calls`` is too low.
    """
    spent = sum(len(recorded.scores) for recorded in record)
    unfinished = [recorded for recorded in record if not recorded.told and recorded.examples]
    due = missing + sum(len(r.examples or ()) - len(r.scores) for r in unfinished)
    if record and due and spent + due > max_calls:
        raise InvalidArgumentError(
            f"max_calls={max_calls} is too low to go on: the study holds {spent} calls, and to finish the "
            f"trials that were left open and to measure the baseline takes {due} more. Raise max_calls."
        )


def salvaged(study: Study, scores: Mapping[int, Mapping[int, float]]) -> Study:
    """A copy of a study whose storage fails: nothing that was measured is lost with it.

    Args:
        study: What the storage still shows.
        scores: Trial number to the scores that it may not hold yet. Open trials are abandoned.
    """
    trials = study.get_trials()
    return in_memory(
        study, [_abandoned(t, scores.get(t.number, {})) if t.state in _OPEN else t for t in trials]
    )


def abandoned_attributes(examples: Examples | None, scores: Mapping[int, float]) -> dict[str, Any]:
    """What a trial is closed with that its run leaves to the next one.

    Args:
        examples: What it was to be measured on, if that was known.
        scores: What it has of them.
    """
    # First, so that it is never lost what was planned.
    planned = {PLANNED: list(examples)} if examples else {}
    return {**planned, ABANDONED: True, EXAMPLES: list(scores), SCORES: list(scores.values())}


def _abandoned(trial: FrozenTrial, scores: Mapping[int, float]) -> FrozenTrial:
    stored = recorded_of(trial)
    kept = {**scores, **stored.scores}
    attributes = abandoned_attributes(stored.examples, kept)
    return create_trial(
        state=TrialState.FAIL,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**trial.user_attrs, **attributes},
        system_attrs=trial.system_attrs,
        intermediate_values=kept,
    )
