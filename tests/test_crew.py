"""Who is there, who leads, and who is taken for dead: processes played by threads of one."""

from __future__ import annotations

import time
from collections.abc import Callable

import optuna
import pytest
from optuna.trial import TrialState

from mpromptune.crew.members import Crew, LeftOutError, check_coordinators
from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.studies.attributes import BEAT, FAREWELL, HELPS
from mpromptune.studies.storage import open_study

# Seconds without a sign of life after which these are dead.
LEASE = 0.6


@pytest.fixture
def study() -> optuna.Study:
    return open_study(None)


def joined(study: optuna.Study, lease: float = LEASE) -> Crew:
    crew = Crew(study, threads=4, lease=lease)
    crew.join()
    return crew


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def silenced(crew: Crew) -> None:
    """As a process that has been killed, or is held up: it gives no sign of life any more."""
    crew._gone.set()


def sees(crew: Crew) -> list[int]:
    crew.look()
    return [member.number for member in crew.present]


def test_the_first_leads_and_then_the_next(study: optuna.Study) -> None:
    """In the order in which they joined, as soon as those before have left."""
    first, second, third = (joined(study) for _ in range(3))
    assert sees(third) == [0, 1, 2]
    assert (first.leads, third.leads) == (True, False)
    second.leave()
    first.leave()
    assert sees(third) == [2]
    assert third.leads


def test_who_gives_no_sign_of_life_is_dead_for_all(study: optuna.Study) -> None:
    """A process that was held up learns so, and does not lead any more; it may join again, as the last."""
    held_up, other, third = (joined(study) for _ in range(3))
    silenced(held_up)
    until(lambda: sees(other) == [1, 2])
    assert other.leads
    assert sees(third) == [1, 2]
    with pytest.raises(LeftOutError, match="without a sign of life"):
        held_up.require_present()
    held_up.join()
    assert sees(other) == sees(held_up) == [1, 2, 3]


def test_the_living_are_not_taken_for_dead(study: optuna.Study) -> None:
    """However long it takes, and although nobody compares clocks."""
    first, second = joined(study), joined(study)
    began = time.monotonic()
    while time.monotonic() < began + 3 * LEASE:
        assert sees(second) == [0, 1]
        time.sleep(0.05)
    assert first.me.notes[BEAT] != second.members[0].notes[BEAT]


def test_an_observer_that_was_held_up_declares_nobody_dead(study: optuna.Study) -> None:
    """What it did not see for want of looking is not held against the others."""
    first, second = joined(study, lease=30.0), joined(study, lease=1.5)
    sees(second)
    time.sleep(2.0)
    assert sees(second) == [0, 1]
    assert sees(first) == [0, 1]


def test_signs_of_life_are_left_where_the_storage_is_lost(study: optuna.Study) -> None:
    """A member that cannot write for a while goes on as soon as it can."""
    crew = joined(study)
    storage, crew._storage = crew._storage, None  # type: ignore[assignment]
    time.sleep(LEASE / 2)
    crew._storage = storage
    before = storage.get_trial(crew.me.trial_id).user_attrs[BEAT]
    until(lambda: storage.get_trial(crew.me.trial_id).user_attrs[BEAT] > before)


def test_why_the_leader_stopped_is_told_to_all(study: optuna.Study) -> None:
    """To those who were there; who comes later begins anew."""
    first, second = joined(study), joined(study)
    with pytest.raises(SearchStoppedError), first.taking_part():
        raise SearchStoppedError("The search stopped on a wrong key.")
    second.look()
    assert second.members[0].notes[FAREWELL]["why"] == "stopped"
    with pytest.raises(SearchStoppedError, match="a wrong key"):
        second.require_going()
    second.leave()
    third = joined(study)
    third.require_going()
    assert third.leads


def test_an_interrupt_concerns_nobody_else(study: optuna.Study) -> None:
    """It leaves, and the next one leads."""
    first, second = joined(study), joined(study)
    with pytest.raises(KeyboardInterrupt), first.taking_part():
        raise KeyboardInterrupt
    second.look()
    second.require_going()
    assert second.leads


def test_members_take_calls_once_they_say_so(study: optuna.Study) -> None:
    """Until then they count no threads; their records are trials beside the study, not in it."""
    crew = joined(study)
    assert crew.me.threads == 0
    crew.note(HELPS, True)
    crew.look()
    assert crew.me.threads == 4
    assert study.trials == []
    crew.leave()
    assert study._storage.get_trial(crew.me.trial_id).state is TrialState.FAIL


@pytest.mark.parametrize(("number", "storage"), [(0, "run.log"), (1.5, "run.log"), (2, None)])
def test_what_cannot_be_shared(number: int, storage: str | None) -> None:
    """No number of processes, or a storage that only one of them sees, is refused."""
    with pytest.raises(InvalidArgumentError, match="coordinators"):
        check_coordinators(number, storage)
