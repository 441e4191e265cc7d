"""Taking part in a search that several processes share: helping first, leading when it is one's turn."""

from __future__ import annotations

from functools import partial

from optuna.study import Study

from mpromptune.calls.interrupts import interrupted
from mpromptune.calls.limits import SEARCH
from mpromptune.calls.usage import Usage
from mpromptune.crew.handout import Handout
from mpromptune.crew.helping import help_until_leading
from mpromptune.crew.members import LIMIT, Crew
from mpromptune.crew.shared import SharedWorkers
from mpromptune.errors import SearchInterrupted
from mpromptune.loop.coordinator import Coordinator
from mpromptune.loop.result import SearchResult
from mpromptune.loop.setup import Setup
from mpromptune.loop.shared_trials import SharedTrials
from mpromptune.plans.knowledge import Knowledge


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
    meter = budget.step(SEARCH)
    # What this process has measured before, its trials will say.
    meter.add(sum((recorded.usage for recorded in record), Usage()) - meter.total)
    budget.begin_search()
    if (ended := crew.ended()).get("why") == LIMIT:  # whatever used it up, it is for all
        budget.reached = ended["name"]
    handout = Handout(crew, workers, study, budget, record)
    trials = SharedTrials(study, setup.space, record, crew, handout)
    known = Knowledge(study, encoding, setup.plan.n_examples)
    with handout.running():
        result = run(workers=workers, trials=trials, known=known).run()
    crew.leave({"why": LIMIT, "name": result.stopped_by} if result.stopped_by else None)
    return result
