"""Proposals in a study: each is saved with the trial that first measures its candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from optuna.study import Study

from mpromptune.execution.usage import Usage
from mpromptune.storage.attributes import PROPOSAL


@dataclass(frozen=True)
class Proposal:
    """A request for a candidate, and what was written.

    Attributes:
        number: Number of the proposal in the search, from 0.
        component: Name of the component.
        index: Index of the candidate.
        proposer: Name of the proposer.
        parent: Params of the configuration to improve.
        descends: Whether the candidate is made from that of the parent; otherwise it is unrelated to it.
        written: The candidate as JSON; None if it is not written yet.
        refused: Why there is no candidate, if the proposer has failed.
        declined: Whether the proposer had nothing to write and made no request, so that it cost nothing.
        usage: What it took.
    """

    number: int
    component: str
    index: int
    proposer: str
    parent: Mapping[str, int]
    descends: bool = True
    written: Any = None
    refused: str | None = None
    declined: bool = False
    usage: Usage = field(default_factory=Usage)

    @property
    def source(self) -> int | None:
        """The index of the candidate that this one is made from; None if there is none."""
        return self.parent[self.component] if self.descends else None

    @property
    def is_over(self) -> bool:
        """Whether the proposer has answered."""
        return self.written is not None or self.refused is not None


def read_proposals(study: Study) -> tuple[Proposal, ...]:
    """All proposals of a study, in order."""
    found = {}
    for trial in study.get_trials(deepcopy=False):
        if PROPOSAL in trial.user_attrs:  # a trial that continues an earlier one has its proposal, too
            proposal = from_json(trial.user_attrs[PROPOSAL])
            found[proposal.number] = proposal
    return tuple(found[number] for number in sorted(found))


def to_json(proposal: Proposal) -> str:
    """The proposal as text."""
    return json.dumps({**asdict(proposal), "usage": proposal.usage.as_dict()})


def from_json(text: str) -> Proposal:
    """The proposal from the result of `to_json`."""
    entry: Mapping[str, Any] = json.loads(text)
    return Proposal(**{**entry, "usage": Usage(**entry["usage"])})
