"""A search made ready on its study: settings compared, the record read, the sampler set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.samplers import BaseSampler
from optuna.study import Study

from mpromptune.engine.batches import BatchPlan
from mpromptune.engine.plan import Plan
from mpromptune.engine.pool import default_batch_size, default_rounds_in_flight
from mpromptune.engine.settings import (
    compare_geometry,
    recorded_settings,
    require_same,
    settings_of,
    write_settings,
)
from mpromptune.model.space import PromptSpace
from mpromptune.sampling.encoding import Encoding
from mpromptune.sampling.sampler import qEISampler
from mpromptune.sampling.samplers import bind, distributions_of, resolve_sampler
from mpromptune.storage.damage import named, readable, require_readable
from mpromptune.storage.record import Record, check_left, missing_of, read_record


@dataclass(frozen=True)
class Setup:
    """What the trials of a search depend on.

    Attributes:
        space: The configurations.
        plan: What is measured next; its rounds are sized here.
        arguments: What must stay as it is in a study.
        sampler: Proposes configurations.
        batch_size: Configurations per round, if given.
        num_threads: Calls in flight at once.
        trial_size: Examples of a trial.
        confirmed: Whether the baseline is to end with a score on every example.
    """

    space: PromptSpace
    plan: Plan
    arguments: Mapping[str, Any]
    sampler: BaseSampler | str | None
    batch_size: int | None
    num_threads: int
    trial_size: int
    confirmed: bool

    def take_up(self, study: Study) -> tuple[Record, Encoding]:
        """What earlier runs have left, and the candidates as the surrogate sees them.

        Raises:
            InvalidArgumentError: The budget is too low to go on.
            StudyMismatchError: The study belongs to another search.
            StorageError: It is damaged.
        """
        plan = self.plan
        with readable(f"What {named(study)} says of its search"):
            before = recorded_settings(study)
            plan.batch_size = self._batch_size(before)
            plan.rounds_in_flight = self._rounds_in_flight(before)
            settings = settings_of(self.space, self.arguments, plan)
            require_same(study, before, settings)
        require_readable(study, distributions_of(self.space), plan.n_examples)
        record = read_record(study)
        start, n_examples = self.space.params(plan.baseline), plan.n_examples
        check_left(record, plan.max_calls, missing_of(record, start, n_examples) if self.confirmed else 0)
        encoding = self._set_sampler(study)
        with readable(f"What {named(study)} says of its candidates"):
            compare_geometry(study, encoding)
        write_settings(study, settings)
        return record, encoding

    def _batch_size(self, before: Mapping[str, Any]) -> int:
        """As given, as the sampler has it, as before, or by the number of threads and the budget."""
        own = self.sampler.batch_size if isinstance(self.sampler, qEISampler) else None
        usual = default_batch_size(self.trial_size, self.plan.max_calls)
        return self.batch_size or own or int(before.get("batch_size") or usual)

    def _rounds_in_flight(self, before: Mapping[str, Any]) -> int:
        """As before, so that other threads make no other trials; unless rounds are of another size now."""
        if before.get("batch_size") == self.plan.batch_size:
            return int(before["rounds_in_flight"])
        if not isinstance(self.plan, BatchPlan):
            return self.plan.rounds_in_flight
        return default_rounds_in_flight(
            self.num_threads, self.plan.batch_size, self.trial_size, self.plan.max_calls
        )

    def _set_sampler(self, study: Study) -> Encoding:
        plan, seed = self.plan, int(self.arguments["seed"])
        n_trials = len(study.get_trials(deepcopy=False))
        own = resolve_sampler(self.sampler, self.space, seed, n_trials)
        study.sampler, encoding = bind(own, self.space, plan.is_open, seed)
        if n_trials and own is self.sampler:  # its stream is at its beginning, and would come again
            study.sampler.reseed_rng()
        return encoding
