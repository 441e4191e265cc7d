"""Taking part in a search that several processes share: helping first, leading when it is one's turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from optuna.storages import InMemoryStorage
from optuna.study import Study

from mpromptune.coordinator import Coordinator
from mpromptune.crew import LIMIT, Crew
from mpromptune.errors import InvalidArgumentError, SearchInterrupted, require_count
from mpromptune.handout import Handout
from mpromptune.helping import help_until_leading
from mpromptune.interrupts import interrupted
from mpromptune.knowledge import Knowledge
from mpromptune.limits import SEARCH
from mpromptune.result import SearchResult
from mpromptune.setup import Setup
from mpromptune.shared import SharedWorkers
from mpromptune.shared_trials import SharedTrials
from mpromptune.storage import StorageSpec
from mpromptune.usage import Usage


def check_coordinators(coordinators: int, storage: StorageSpec) -> None:
    """Refuses what cannot be shared.

    Raises:
        InvalidArgumentError: The number is none, or there is no storage that several processes see.
    """
    require_count("coordinators", coordinators)
    if coordinators > 1 and (storage is None or isinstance(storage, InMemoryStorage)):
        raise InvalidArgumentError(
            f"coordinators={coordinators} needs a storage that all of them see: a database such as "
            "postgresql+psycopg://..., the path of a journal file on one machine, or Optuna's gRPC proxy."
        )


@contextmanager
def taking_part(crew: Crew | None, study: Study, num_threads: int) -> Iterator[Crew]:
    """A place in the crew of a study, from now on; or the one that this process has already."""
    if crew is not None:
        yield crew
        return
    joined = Crew(study, num_threads)
    joined.join()
    with joined.taking_part():
        yield joined


def search_together(
    setup: Setup, study: Study, run: partial[Coordinator], workers: SharedWorkers, crew: Crew
) -> SearchResult:
    """Helps until this process is the first, and then leads, from where the search is.

    Args:
        setup: The search.
        study: The study.
        run: Makes the coordinator.
        workers: Those of this process.
        crew: All processes.

    Raises:
        SearchInterrupted: This process was interrupted; the others go on.
        SearchStoppedError: Whoever led has stopped the search, or this process has to.
    """
    grace = run.keywords["grace"]
    try:
        help_until_leading(crew, workers, partial(setup.check, study))
        return _lead(setup, study, run, workers, crew)
    except SearchInterrupted:
        raise
    except KeyboardInterrupt as signalled:
        message = "This coordinator was interrupted; what it measured is kept in the study."
        raise interrupted(signalled)(message, study) from signalled
    finally:
        workers.finish(grace)


def _lead(
    setup: Setup, study: Study, run: partial[Coordinator], workers: SharedWorkers, crew: Crew
) -> SearchResult:
    budget = run.keywords["budget"]
    record, encoding = setup.take_up(study)
    budget.step(SEARCH).add(sum((recorded.usage for recorded in record), Usage()))
    budget.begin_search()
    if (ended := crew.ended()).get("why") == LIMIT:  # whatever used it up, it is for all
        budget.reached = ended["name"]
    handout = Handout(crew, workers, study, budget, record)
    trials = SharedTrials(study, setup.space, record, crew, handout)
    known = Knowledge(study, encoding, hidden=trials.untold)
    with handout.running():
        result = run(workers=workers, trials=trials, known=known).run()
    crew.leave({"why": LIMIT, "name": result.stopped_by} if result.stopped_by else None)
    return result
