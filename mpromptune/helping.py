"""A process that does not lead a shared search: it measures what it is handed until it is the first."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mpromptune.attributes import HELPS, TAKEN
from mpromptune.crew import POLL, Crew, LeftOutError
from mpromptune.errors import SearchStoppedError
from mpromptune.interrupts import pause
from mpromptune.shared import SharedWorkers, read_calls

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
        _take(crew, workers)
        pause(POLL)
        _look(crew, workers)


def _look(crew: Crew, workers: SharedWorkers) -> None:
    try:
        crew.look()
    except LeftOutError:  # it was held up; what was its own has been handed to others
        logger.warning("This coordinator was taken for dead; it takes part again.")
        workers.keep_only(())
        crew.join()
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
