"""The live progress bar of a compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


class SearchBar:
    """Counts program calls and trials."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def on_call(self, calls: int, max_calls: int) -> None:
        """More program calls have come back; any thread may say so."""
        self._progress.advance(self._task, calls)

    def on_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A trial was told."""
        self._progress.update(self._task, trials=trial.number + 1)


@contextmanager
def progress_bar(title: str, max_calls: int) -> Iterator[SearchBar]:
    """A bar over ``max_calls`` program calls; invisible where another live display owns the terminal."""
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("calls · {task.fields[trials]} trials ·"),
        TimeRemainingColumn(),
    )
    task = progress.add_task(title, total=max_calls, trials=0)
    try:
        progress.start()
    except LiveError:
        progress.disable = True
    try:
        yield SearchBar(progress, task)
    finally:
        progress.stop()
