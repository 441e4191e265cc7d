"""The record: the trials of earlier runs in a study, which are told, open or abandoned."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from mpromptune.errors import InvalidArgumentError
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Examples
from mpromptune.storage.attributes import (
    ABANDONED,
    EXAMPLES,
    NOTE,
    PLANNED,
    PROPOSAL,
    REFUSED,
    RESUMES,
    SCORES,
    USAGE,
)
from mpromptune.storage.findings import in_memory
from mpromptune.storage.proposals import Proposal, from_json

_OPEN = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class Recorded:
    """A trial of an earlier run.

    Attributes:
        number: Its number.
        trial_id: Its identity in the storage.
        params: Its configuration; perhaps only a part for an open trial.
        examples: The examples that it was asked on; None for an open trial for which none were chosen yet.
        scores: Example to score; ``failure_score`` where the candidate failed, when the trial is told.
        told: Whether it was told, and is over.
        is_open: Whether its state is RUNNING or WAITING.
        usage: Its usage.
        refused: The scored examples on which the prompt was refused.
        notes: Example to what the score function said about the call beside its score.
        proposal: The proposal of the candidate that it measures first, if there is one.
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
    notes: Mapping[int, Any] = field(default_factory=dict)
    proposal: Proposal | None = None

    @property
    def lost(self) -> Examples:
        """The examples that have no score although the trial was told."""
        return tuple(e for e in self.examples or () if e not in self.scores) if self.told else ()


Record = deque[Recorded]


def read_record(study: Study) -> Record:
    """The trials of a study in the order in which a search asked for them.

    A trial that continues an abandoned one takes its place. Trials abandoned before their examples were
    chosen are left out.
    """
    trials = study.get_trials(deepcopy=False)
    origin: dict[int, int] = {}
    for trial in trials:
        resumed = trial.user_attrs.get(RESUMES, trial.number)
        origin[trial.number] = origin.get(resumed, trial.number)
    taken_up = {trial.user_attrs.get(RESUMES) for trial in trials}
    found = [recorded_of(trial) for trial in trials if trial.number not in taken_up]
    # The params of a trial may be lost with a line of a journal; its scores are useless without them.
    names = {name for trial in trials for name in trial.params}
    useful = [r for r in found if r.is_open or ((r.told or r.examples) and r.params.keys() >= names)]
    return deque(sorted(useful, key=lambda recorded: origin[recorded.number]))


def recorded_of(trial: FrozenTrial) -> Recorded:
    """A trial of the storage as part of the record."""
    attributes = trial.user_attrs
    is_open = trial.state in _OPEN
    # A trial that its storage closed (because a heartbeat stopped) has no scores, and counts as abandoned.
    closed = (EXAMPLES in attributes) == (SCORES in attributes)
    told = not is_open and closed and ABANDONED not in attributes
    planned = attributes.get(PLANNED, attributes.get(EXAMPLES))
    examples = tuple(planned) if planned is not None else None
    scores = dict(zip(attributes.get(EXAMPLES, ()), attributes.get(SCORES, ()), strict=False))
    if not told:  # scores saved as intermediate values, some perhaps after it was closed
        scores.update(trial.intermediate_values)
    usage = Usage(**json.loads(attributes.get(USAGE, "{}")))
    refused = tuple(example for example in attributes.get(REFUSED, ()) if example in scores)
    identity = trial.number, trial._trial_id, dict(trial.params)
    # A call without a score is made again, and says something else then.
    kept = {example: attributes.get(note_attribute(example)) for example in scores}
    notes = {example: note for example, note in kept.items() if note is not None}
    proposal = from_json(attributes[PROPOSAL]) if PROPOSAL in attributes else None
    return Recorded(*identity, examples, scores, told, is_open, usage, refused, notes, proposal)


def note_attribute(example: int) -> str:
    """The name of the attribute of a trial with the note on an example."""
    return f"{NOTE}:{example}"


def check_left(record: Record, max_calls: int, missing: int, proposal_calls: int = 0) -> None:
    """Require a budget for the calls that were made and those that must follow.

    Args:
        record: The trials of earlier runs; those that are not told will be completed.
        max_calls: The budget.
        missing: Further calls that must follow.
        proposal_calls: Calls that the proposals of earlier runs count as.

    Raises:
        InvalidArgumentError: ``max_calls`` is too low.
    """
    spent = sum(len(recorded.scores) for recorded in record) + proposal_calls
    unfinished = [recorded for recorded in record if not recorded.told and recorded.examples]
    due = missing + sum(len(r.examples or ()) - len(r.scores) for r in unfinished)
    if record and due and spent + due > max_calls:
        raise InvalidArgumentError(
            f"max_calls={max_calls} is too low to continue: the study has {spent} calls, and finishing its "
            f"open trials and measuring the baseline takes {due} more. Raise max_calls."
        )


def salvaged(study: Study, scores: Mapping[int, Mapping[int, float]]) -> Study:
    """A copy in memory of a study whose storage fails, with all scores; open trials are abandoned.

    Args:
        study: The study, as far as the storage can still be read.
        scores: Trial number to scores that the storage may lack.
    """
    trials = study.get_trials()
    return in_memory(
        study, [_abandoned(t, scores.get(t.number, {})) if t.state in _OPEN else t for t in trials]
    )


def closing_attributes(
    examples: Examples | None,
    scores: Mapping[int, float],
    refused: Sequence[int] = (),
    abandoned: bool = False,
) -> dict[str, Any]:
    """The attributes of a trial that is closed.

    Args:
        examples: The examples that it was asked on, if they were chosen.
        scores: Example to score.
        refused: The scored examples on which the prompt was refused.
        abandoned: Whether the next run continues it.
    """
    is_partial = abandoned or len(scores) < len(examples or ())
    return {
        # First, so that the planned examples are never lost.
        **({PLANNED: list(examples)} if examples and is_partial else {}),
        **({ABANDONED: True} if abandoned else {}),
        **({REFUSED: list(refused)} if refused else {}),
        EXAMPLES: list(scores),
        SCORES: list(scores.values()),
    }


def _abandoned(trial: FrozenTrial, scores: Mapping[int, float]) -> FrozenTrial:
    stored = recorded_of(trial)
    kept = {**scores, **stored.scores}
    attributes = closing_attributes(stored.examples, kept, abandoned=True)
    return create_trial(
        state=TrialState.FAIL,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**trial.user_attrs, **attributes},
        system_attrs=trial.system_attrs,
        intermediate_values=kept,
    )
