"""The live display of a compile: a bar for each of its steps."""

from __future__ import annotations

from optuna.study import Study
from optuna.trial import FrozenTrial
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mpromptune.interrupts import deferred


class Bar:
    """Counts what is done of one step."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, number: int = 1) -> None:
        """So many more are done; any thread may say so."""
        with deferred():  # an interrupt halfway would leave the terminal as it is
            self._progress.advance(self._task, number)

    def on_call(self, calls: int, max_calls: int) -> None:
        """More program calls have come back."""
        self.advance(calls)

    def on_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A trial was told."""
        with deferred():
            self._progress.update(self._task, unit=f"calls · {trial.number + 1} trials")


class Display:
    """Bars below each other; invisible where another live display owns the terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} ·"),
            TimeRemainingColumn(),
        )

    def bar(self, title: str, total: int, unit: str) -> Bar:
        """A bar below those of the steps before; the first one opens the display."""
        with deferred():
            if not self._progress.tasks:
                try:
                    self._progress.start()
                except LiveError:
                    self._progress.disable = True
            return Bar(self._progress, self._progress.add_task(title, total=total, unit=unit))

    def close(self) -> None:
        """Leaves the bars as they are."""
        with deferred():
            self._progress.stop()
