"""The trials of a search in their study: asked anew or taken from an earlier run, kept, and told.

A search that goes on takes every step again that it took before. Trials that were told are answers without a
call. Those that a killed run left open go on under their own number, so that nobody could tell that it was
killed; abandoned ones, which are closed, under a new one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from mpromptune.engine.scores import Examples, ScoreTable
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.usage import Meter, Usage
from mpromptune.model.space import PromptSpace, Row
from mpromptune.sampling.encoding import distributions_of
from mpromptune.storage.attributes import ABANDONED, EXAMPLES, PLANNED, REFUSED, RESUMES, SCORES, USAGE
from mpromptune.storage.lease import Lease
from mpromptune.storage.record import Record, Recorded, abandoned_attributes, recorded_of


@dataclass(frozen=True)
class Asked:
    """The answer to a request for a trial.

    Attributes:
        trial: To be measured; None when an earlier run has told it.
        number: Its number.
        row: Its configuration.
        examples: What an earlier run chose to measure it on, or None; empty for nothing.
        scores: What an earlier run paid for.
        meter: What it has used, in earlier runs too.
        refused: Examples on which the prompt was refused, as an earlier run has told.
    """

    trial: Trial | None
    number: int
    row: Row
    examples: Examples | None = None
    scores: Mapping[int, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    refused: Examples = ()

    @classmethod
    def of(cls, recorded: Recorded, row: Row, trial: Trial | None = None) -> Asked:
        """A trial of an earlier run; ``trial`` unless it was told."""
        examples = recorded.examples if trial is not None else recorded.examples or ()
        asked = cls(trial, recorded.number, row, examples, recorded.scores, refused=recorded.refused)
        asked.meter.add(recorded.usage)
        return asked


class Trials:
    """Answers requests from the record of earlier runs first, and then from the sampler.

    Args:
        study: The study; its sampler proposes configurations.
        space: The configurations.
        record: The trials of earlier runs.
        lease: Says whether this run may write to the study.

    Attributes:
        told: Trials told, in earlier runs too.
    """

    def __init__(self, study: Study, space: PromptSpace, record: Record, lease: Lease) -> None:
        self.study, self.record, self.lease = study, record, lease
        self._space = space
        self._distributions = distributions_of(space)
        self._lock = threading.Lock()
        self._closed: set[int] = set()
        self.told = 0

    def next(self, row: Row | None) -> Asked:
        """The next trial of the record; after the last, a new one of ``row``, or of the sampler's choice."""
        self.lease.require()
        while self.record:
            recorded = self.record.popleft()
            asked = self._told(recorded) if recorded.told else self._again(recorded)
            if asked is not None:
                return asked
        if row is None:
            trial = self.study.ask(fixed_distributions=self._distributions)
        else:
            with deferred():  # an interrupt in between would leave a trial that waits, and that nobody closes
                self.study.enqueue_trial(self._space.params(row))
                trial = self.study.ask(fixed_distributions=self._distributions)
        return Asked(trial, trial.number, self._space.row(trial.params))

    def _told(self, recorded: Recorded) -> Asked:
        return Asked.of(recorded, self._space.row(recorded.params) if recorded.examples else ())

    def _again(self, recorded: Recorded) -> Asked | None:
        with deferred():
            return self._open(recorded if recorded.is_open else self._taken_up(recorded))

    def _taken_up(self, abandoned: Recorded) -> Recorded:
        """A new trial in the place of a closed one; with its scores, in a single write."""
        trial = create_trial(
            state=TrialState.WAITING,
            user_attrs={
                RESUMES: abandoned.number,
                EXAMPLES: list(abandoned.examples or ()),
                USAGE: json.dumps(abandoned.usage.as_dict()),
                **({REFUSED: list(abandoned.refused)} if abandoned.refused else {}),
            },
            system_attrs={"fixed_params": dict(abandoned.params)},
            intermediate_values=dict(abandoned.scores),
        )
        self.study.add_trial(trial)
        return recorded_of(self.study.get_trials(deepcopy=False)[-1])

    def _open(self, recorded: Recorded) -> Asked | None:
        """A trial that was left open; None when it was left in the middle of a proposal that is lost."""
        # A killed run may have left it waiting.
        self.study._storage.set_trial_state_values(recorded.trial_id, TrialState.RUNNING)
        trial = Trial(self.study, recorded.trial_id)
        for name, distribution in self._distributions.items():
            assert isinstance(distribution, CategoricalDistribution)
            trial.suggest_categorical(name, distribution.choices)  # what is stored, where it is
        row = tuple(int(trial.params[name]) for name in self._space.names)
        if self._space.exists(row):
            return Asked.of(recorded, row, trial)
        self._forget(trial)  # half of it is from a sampler that has forgotten what it drew
        return None

    def _forget(self, trial: Trial) -> None:
        """Closes one of which nothing was measured, as if it had not been asked for."""
        trial.set_user_attr(ABANDONED, True)
        self.study.tell(trial, state=TrialState.FAIL)

    def start(self, asked: Asked, examples: Sequence[int]) -> None:
        """Notes what a trial is to be measured on."""
        self.lease.require()
        if asked.trial is not None and asked.examples is None:
            asked.trial.set_user_attr(EXAMPLES, list(examples))

    def keep(self, asked: Asked, example: int, score: float | None, usage: Usage) -> None:
        """Saves at once what a call used, and its score, if any, as an intermediate value.

        A call that hung until its trial was closed comes too late.
        """
        assert asked.trial is not None
        self.lease.require()
        with self._lock:
            if asked.number in self._closed:
                return
            asked.meter.add(usage)
            asked.trial.set_user_attr(USAGE, json.dumps(asked.meter.total.as_dict()))
            if score is not None:
                asked.trial.report(score, step=example)

    def drop(self, asked: Asked) -> None:
        """Closes a trial of which nothing is to be measured."""
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
        """Tells a trial: its mean when every example was measured, FAIL otherwise.

        Args:
            asked: The trial; None is returned for one that an earlier run has told.
            examples: What it was to be measured on.
            scores: Example to score.
            refused: Of those, the examples on which the prompt was refused.
            abandoned: Whether the run ends, and the next one is to take up what it lacks.
        """
        self.lease.require()
        self.told += 1
        trial = asked.trial
        if trial is None:
            return None
        with self._lock:  # no score is being saved
            self._closed.add(asked.number)
        failed = len(scores) < len(examples)
        attributes = {
            # First, so that it is never lost what was planned.
            **({PLANNED: list(examples)} if failed else {}),
            **({ABANDONED: True} if failed and abandoned else {}),
            **({REFUSED: list(refused)} if refused else {}),
            EXAMPLES: list(scores),
            SCORES: list(scores.values()),
        }
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if failed:
            return self.study.tell(trial, state=TrialState.FAIL)
        return self.study.tell(trial, sum(scores.values()) / len(scores))

    def rest(self) -> Iterator[Asked]:
        """What is left of the record when the search needs no more of it; it was paid for all the same."""
        while self.record:
            recorded = self.record.popleft()
            asked = self._open(recorded) if recorded.is_open else self._told(recorded)
            if asked is None:
                continue
            if asked.trial is not None and asked.examples is None:  # killed in the middle of a proposal
                self._forget(asked.trial)
            else:
                yield asked

    def abandon_open(self) -> None:
        """Closes what is still open: trials that the sampler failed on, and the record's."""
        self.lease.require()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            recorded = recorded_of(trial)
            for name, value in abandoned_attributes(recorded.examples, recorded.scores).items():
                self.study._storage.set_trial_user_attr(trial._trial_id, name, value)
            self.study.tell(trial.number, state=TrialState.FAIL)


def table_of(record: Record, space: PromptSpace, n_examples: int) -> ScoreTable:
    """The scores of earlier runs."""
    table = ScoreTable(n_examples)
    for recorded in record:
        if recorded.params.keys() == set(space.names):
            examples = recorded.examples or tuple(recorded.scores)
            known = {"usage": recorded.usage, "refused": set(recorded.refused), "is_over": recorded.told}
            table.add(space.row(recorded.params), examples, recorded.scores, **known)
    return table
