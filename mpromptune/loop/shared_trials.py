"""The trials of a search that several processes share: whoever leads next takes up what is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.calls.usage import Usage
from mpromptune.crew.handout import Handout
from mpromptune.crew.members import Crew
from mpromptune.loop.trials import Asked, Trials
from mpromptune.model.space import PromptSpace, Row
from mpromptune.studies.ledger import Examples
from mpromptune.studies.record import Record


class SharedTrials(Trials):
    """Asks and tells only while this process leads, and leaves open what it does not finish.

    Args:
        study: The study; its sampler proposes configurations.
        space: The configurations.
        record: The trials of earlier runs.
        crew: The processes that share the study.
        handout: Knows what trials have used.
    """

    def __init__(
        self, study: Study, space: PromptSpace, record: Record, crew: Crew, handout: Handout
    ) -> None:
        super().__init__(study, space, record)
        self._crew = crew
        self._handout = handout

    def next(self, row: Row | None) -> Asked:
        """As `Trials.next`."""
        self._crew.require_present()
        return super().next(row)

    def start(self, asked: Asked, examples: Sequence[int]) -> None:
        """As `Trials.start`."""
        self._crew.require_present()
        super().start(asked, examples)

    def usage(self, asked: Asked) -> Usage:
        """What all processes have used for a trial so far."""
        known = None if asked.trial is None else self._handout.usage(asked.trial._trial_id)
        return asked.meter.total if known is None else known

    def tell(
        self,
        asked: Asked,
        examples: Examples,
        measured: Mapping[int, float],
        abandoned: bool = False,
        refused: Sequence[int] = (),
    ) -> FrozenTrial | None:
        """As `Trials.tell`."""
        self._crew.require_present()
        return super().tell(asked, examples, measured, abandoned, refused)

    def leave(self, asked: Asked, examples: Examples, measured: Mapping[int, float]) -> None:
        """Leaves it open: its scores are saved, and others may be measuring it."""

    def abandon_open(self) -> None:
        """Leaves those open too that nothing has been measured of."""
