"""The trials of a search in their study: asked or taken from the record of earlier runs, saved, and told.

A continued search repeats all steps of the earlier runs. A trial that was told in an earlier run needs no
call. A trial that a killed run left open continues under its own number, so that the study equals that of an
uninterrupted search. An abandoned trial is closed, so it continues as a new trial.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from mpromptune.engine.growth import Growth, Offer
from mpromptune.engine.scores import ScoreTable
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.pool import Outcome, outcome_of
from mpromptune.execution.usage import Meter
from mpromptune.model.space import Examples, PromptSpace, Row
from mpromptune.sampling.encoding import distributions_of
from mpromptune.storage.attributes import ABANDONED, EXAMPLES, PROPOSAL, REFUSED, RESUMES, USAGE
from mpromptune.storage.lease import Lease
from mpromptune.storage.proposals import Proposal, to_json
from mpromptune.storage.record import Record, Recorded, closing_attributes, note_attribute, recorded_of


@dataclass(frozen=True)
class Asked:
    """A trial for a request of the plan.

    Attributes:
        trial: The trial to measure; None if an earlier run has told it.
        number: Its number.
        row: Its configuration.
        examples: The examples that an earlier run chose for it, or None; empty if it chose none.
        scores: The scores that an earlier run paid for.
        meter: Its usage, including that in earlier runs.
        refused: The examples on which the prompt was refused in an earlier run.
        notes: Example to its note, including those of earlier runs.
        proposal: The proposal of its candidate, if this is the first trial of one.
    """

    trial: Trial | None
    number: int
    row: Row
    examples: Examples | None = None
    scores: Mapping[int, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    refused: Examples = ()
    notes: dict[int, Any] = field(default_factory=dict)
    proposal: Proposal | None = None

    @classmethod
    def of(cls, recorded: Recorded, row: Row, trial: Trial | None = None) -> Asked:
        """A trial of the record; ``trial`` is given if it was not told."""
        examples = recorded.examples if trial is not None else recorded.examples or ()
        asked = cls(
            trial,
            recorded.number,
            row,
            examples,
            recorded.scores,
            refused=recorded.refused,
            proposal=recorded.proposal,
        )
        asked.meter.add(recorded.usage)
        asked.notes.update(recorded.notes)
        return asked


@dataclass(frozen=True)
class Running:
    """A trial that is being measured; futures of scores from an earlier run are done from the start.

    Attributes:
        asked: The trial.
        examples: Its examples.
        futures: The outcome on each of them.
        written: Whether there is a candidate, if this is the first trial of one.
    """

    asked: Asked
    examples: Examples
    futures: tuple[Future[Outcome], ...]
    written: Future[bool] | None = None

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes so far, in the order of the examples."""
        return [outcome_of(e, future) for e, future in zip(self.examples, self.futures, strict=True)]


class Trials:
    """Provides trials for requests: first those of the record, then new ones.

    Args:
        study: The study; its sampler proposes configurations.
        space: The configurations.
        record: The trials of earlier runs.
        lease: The right of this run to write to the study.
        growth: Adds candidates to the space.

    Attributes:
        told: Number of trials told, including those of earlier runs.
        notes: ``(row, example)`` to the first note on this pair in a trial that was told.
    """

    def __init__(
        self, study: Study, space: PromptSpace, record: Record, lease: Lease, growth: Growth
    ) -> None:
        self.study, self.record, self.lease = study, record, lease
        self._space, self._growth = space, growth
        self._distributions = distributions_of(space, growth.capacity)
        self._lock = threading.Lock()
        self._closed: set[int] = set()
        self.told = 0
        self.notes: dict[tuple[Row, int], Any] = {}

    def next(self, row: Row | Offer | None) -> Asked:
        """The next trial of the record; after the last, a new one of ``row`` or chosen by the sampler."""
        self.lease.require()
        while self.record:
            recorded = self.record.popleft()
            asked = self._told(recorded) if recorded.told else self._continued(recorded)
            if asked is not None:
                return asked
        if row is None:
            trial = self.study.ask(fixed_distributions=self._distributions)
            return Asked(trial, trial.number, self._space.row(trial.params))
        proposal, kept = None, {}
        if isinstance(row, Offer):
            proposal = self._growth.proposal(row)
            row, kept = row.row(proposal.index), {PROPOSAL: to_json(proposal)}
        params = self._space.params(row)
        with deferred():  # an interrupt in between would leave an enqueued trial that is never closed
            self.study.enqueue_trial(params, user_attrs=kept)
            trial = self.study.ask(fixed_distributions=self._distributions)
            if proposal is not None:
                self._growth.add(proposal)
        return Asked(trial, trial.number, row, proposal=proposal)

    def _told(self, recorded: Recorded) -> Asked:
        self._grow(recorded)
        row = _row(self._space, recorded.params) if recorded.examples else ()
        return Asked.of(recorded, row)

    def _grow(self, recorded: Recorded) -> None:
        if recorded.proposal is not None:
            self._growth.add(recorded.proposal)

    def _continued(self, recorded: Recorded) -> Asked | None:
        with deferred():
            return self._open(recorded if recorded.is_open else self._copied(recorded))

    def _copied(self, abandoned: Recorded) -> Recorded:
        """A new trial with the scores of an abandoned one, added in a single write."""
        trial = create_trial(
            state=TrialState.WAITING,
            user_attrs={
                RESUMES: abandoned.number,
                EXAMPLES: list(abandoned.examples or ()),
                USAGE: json.dumps(abandoned.usage.as_dict()),
                **({REFUSED: list(abandoned.refused)} if abandoned.refused else {}),
                **{note_attribute(example): note for example, note in abandoned.notes.items()},
                **({PROPOSAL: to_json(abandoned.proposal)} if abandoned.proposal else {}),
            },
            system_attrs={"fixed_params": dict(abandoned.params)},
            intermediate_values=dict(abandoned.scores),
        )
        self.study.add_trial(trial)
        return recorded_of(self.study.get_trials(deepcopy=False)[-1])

    def _open(self, recorded: Recorded) -> Asked | None:
        """An open trial of the record; None if the run was killed while the sampler proposed it."""
        # A killed run may have left it in the state WAITING.
        self.study._storage.set_trial_state_values(recorded.trial_id, TrialState.RUNNING)
        trial = Trial(self.study, recorded.trial_id)
        for name, distribution in self._distributions.items():
            assert isinstance(distribution, CategoricalDistribution)
            trial.suggest_categorical(name, distribution.choices)  # returns the stored choice if there is one
        row = _row(self._space, trial.params)
        self._grow(recorded)
        if recorded.proposal is not None or self._space.exists(row):
            return Asked.of(recorded, row, trial)
        self._forget(trial)  # some of its choices are lost with the killed run
        return None

    def _forget(self, trial: Trial) -> None:
        """Close a trial without scores as if it had not been asked for."""
        trial.set_user_attr(ABANDONED, True)
        self.study.tell(trial, state=TrialState.FAIL)

    def start(self, asked: Asked, examples: Sequence[int]) -> None:
        """Save the examples that a trial is measured on."""
        self.lease.require()
        if asked.trial is not None and asked.examples is None:
            asked.trial.set_user_attr(EXAMPLES, list(examples))

    def keep(self, asked: Asked, outcome: Outcome) -> None:
        """Save the usage of a call, its note if there is one and, as an intermediate value, its score.

        The score is written last, since a call with a score is not made again. A call that ends after its
        trial was closed is ignored.
        """
        assert asked.trial is not None
        self.lease.require()
        with self._lock:
            if asked.number in self._closed:
                return
            asked.meter.add(outcome.usage)
            asked.trial.set_user_attr(USAGE, json.dumps(asked.meter.total.as_dict()))
            if outcome.note is not None:
                asked.notes[outcome.example] = outcome.note
                asked.trial.set_user_attr(note_attribute(outcome.example), outcome.note)
            if outcome.score is not None:
                asked.trial.report(outcome.score, step=outcome.example)

    def keep_proposal(self, asked: Asked, proposal: Proposal) -> None:
        """Save what a proposer wrote, or why it did not."""
        assert asked.trial is not None
        self.lease.require()
        with self._lock:
            if asked.number not in self._closed:
                asked.trial.set_user_attr(PROPOSAL, to_json(proposal))

    def drop(self, asked: Asked) -> None:
        """Close a trial that is not measured."""
        if asked.trial is not None:
            self.study.tell(asked.trial, state=TrialState.FAIL)

    def tell(
        self,
        asked: Asked,
        examples: Examples,
        scores: Mapping[int, float],
        refused: Sequence[int] = (),
        abandoned: bool = False,
    ) -> FrozenTrial | None:
        """Tell a trial its mean score if all examples have a score, otherwise FAIL.

        Args:
            asked: The trial; if an earlier run has told it, the result is None.
            examples: The examples that it was asked on.
            scores: Example to score.
            refused: The scored examples on which the prompt was refused.
            abandoned: Whether this run ends and the next one should continue the trial.
        """
        self.lease.require()
        self.told += 1
        for example in () if abandoned else scores:
            if example in asked.notes:
                self.notes.setdefault((asked.row, example), asked.notes[example])
        trial = asked.trial
        if trial is None:
            return None
        with self._lock:  # no score is being saved
            self._closed.add(asked.number)
        failed = len(scores) < len(examples)
        for name, value in closing_attributes(examples, scores, refused, failed and abandoned).items():
            trial.set_user_attr(name, value)
        if failed:
            return self.study.tell(trial, state=TrialState.FAIL)
        return self.study.tell(trial, sum(scores.values()) / len(scores))

    def rest(self) -> Iterator[Asked]:
        """Yield the trials of the record that the search does not ask for; they were paid for too."""
        while self.record:
            recorded = self.record.popleft()
            asked = self._open(recorded) if recorded.is_open else self._told(recorded)
            if asked is None:
                continue
            if asked.trial is not None and asked.examples is None:  # the run was killed during the proposal
                self._forget(asked.trial)
            else:
                yield asked

    def abandon_open(self) -> None:
        """Close all open trials: those on which the sampler failed, and those left in the record."""
        self.lease.require()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            recorded = recorded_of(trial)
            for name, value in closing_attributes(recorded.examples, recorded.scores, abandoned=True).items():
                self.study._storage.set_trial_user_attr(trial._trial_id, name, value)
            self.study.tell(trial.number, state=TrialState.FAIL)


def table_of(record: Record, space: PromptSpace, n_examples: int) -> ScoreTable:
    """The table with the scores of the record."""
    table = ScoreTable(n_examples)
    for recorded in record:
        if recorded.params.keys() == set(space.names):
            examples = recorded.examples or tuple(recorded.scores)
            known = {"usage": recorded.usage, "refused": set(recorded.refused), "is_over": recorded.told}
            table.add(_row(space, recorded.params), examples, recorded.scores, **known)
    return table


def _row(space: PromptSpace, params: Mapping[str, int]) -> Row:
    """Params to an index row, also of a candidate that is closed or not in the space yet."""
    return tuple(int(params[name]) for name in space.names)
