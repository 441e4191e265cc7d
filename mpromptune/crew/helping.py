"""A process that does not lead a shared search: it measures what it is handed until it is the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpromptune.calls.interrupts import pause
from mpromptune.crew.members import POLL, Crew, LeftOutError
from mpromptune.crew.shared import SharedWorkers, read_calls
from mpromptune.errors import SearchStoppedError
from mpromptune.studies.attributes import HELPS, TAKEN

logger = logging.getLogger(__name__)


def help_until_leading(crew: Crew, workers: SharedWorkers, check: Callable[[], None]) -> None:
    """Returns once this process is the first of those that share the study.

    Args:
        crew: The processes.
        workers: Make the calls.
        check: Raises where this process was given another search; called before the first call.

    Raises:
        SearchStoppedError: Whoever led has stopped the search, or this process has to.
    """
    is_checked = False
    crew.note(HELPS, True)
    while not crew.leads:
        if crew.me.handed["items"] and not is_checked:
            check()
            is_checked = True
        if crew.me.threads and workers.has_refused:
            crew.note(HELPS, False)
        _take(crew, workers)
        pause(POLL)
        _look(crew, workers)


def await_candidates(crew: Crew, is_stopped: Callable[[], bool]) -> None:
    """Returns once this process is the first, or whoever is has begun to measure.

    Raises:
        SearchStoppedError: Whoever led has stopped, or this process has to.
    """
    while not (crew.leads or crew.leader.threads):
        pause(POLL)
        if is_stopped():
            raise SearchStoppedError("The compile was told to stop while it waited for another's candidates.")
        with _back_again(crew):
            crew.look()
        crew.require_going()


@contextmanager
def _back_again(crew: Crew) -> Iterator[None]:
    """A process that was held up for so long that it was taken for dead joins again."""
    try:
        yield
    except LeftOutError:
        logger.warning("This coordinator was taken for dead; it takes part again.")
        crew.join()


def _look(crew: Crew, workers: SharedWorkers) -> None:
    number = crew.number
    with _back_again(crew):
        crew.look()
    if crew.number != number:  # what was its own has been handed to others
        workers.keep_only(())
        crew.note(HELPS, True)
    crew.require_going()
    if workers.unsaved is not None:
        raise SearchStoppedError(f"A score could not be saved: {workers.unsaved}") from workers.unsaved
    if workers.stopped.is_set() and workers.fatal is None:  # what is fatal, whoever leads will say
        raise SearchStoppedError("The search was told to stop from outside.")


def _take(crew: Crew, workers: SharedWorkers) -> None:
    """Begins what was handed to this process, and drops what no longer is."""
    handed = crew.me.handed
    if handed["by"] != crew.leader.number:  # who has gone; what is under way will be asked for again
        return
    calls = read_calls(handed["items"])
    is_rest_over = workers.keep_only(calls)
    for call in calls.values():
        workers.measure(call)
    if is_rest_over and handed.get("last") and not crew.me.has_taken:
        crew.note(TAKEN, handed["version"])
