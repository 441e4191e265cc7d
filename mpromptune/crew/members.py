"""Which processes share a study: they join, show that they live, and the first of them leads."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from mpromptune.calls.daemons import started
from mpromptune.errors import InvalidArgumentError, MPromptuneError, SearchStoppedError, require_count
from mpromptune.studies.attributes import BEAT, FAREWELL, HANDED, HELPS, HOST, TAKEN, THREADS
from mpromptune.studies.storage import StorageSpec, reported

logger = logging.getLogger(__name__)

# NOTE: seconds without a sign of life after which a member is taken for dead: three times what a
# lock of a journal file whose owner was killed holds up everybody.
LEASE = 10.0
# Signs of life in that time.
_BEATS = 6
# NOTE: seconds between two looks at the others: a fifth of a short LM call.
POLL = 0.2

STOPPED, LIMIT = "stopped", "limit"


class LeftOutError(MPromptuneError, RuntimeError):
    """The others have taken this process for dead, and go on without it."""


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


@dataclass(frozen=True)
class Member:
    """A process as the storage shows it.

    Attributes:
        number: In the order in which they joined.
        trial_id: Of its record.
        is_present: Whether it has neither left nor been declared dead.
        notes: What it has written down of itself, and what was handed to it.
    """

    number: int
    trial_id: int
    is_present: bool
    notes: Mapping[str, Any]

    @property
    def threads(self) -> int:
        """Calls at a time; 0 for a member that does not take any yet."""
        return int(self.notes.get(THREADS, 1)) if self.notes.get(HELPS) else 0

    @property
    def handed(self) -> dict[str, Any]:
        """The calls that are its own: ``by`` whom, which ``version``, and the ``items``."""
        return dict(self.notes.get(HANDED, {"by": -1, "version": 0, "items": []}))

    @property
    def has_taken(self) -> bool:
        """Whether it has nothing under way but what was handed to it last."""
        return bool(self.notes.get(TAKEN) == self.handed["version"])

    @property
    def farewell(self) -> dict[str, str]:
        """Why it has left, if that concerns the others."""
        return dict(self.notes.get(FAREWELL, {}))


@dataclass
class _Seen:
    """A sign of life, and for how long there has been no other."""

    beat: Any
    silent: float = 0.0


class Crew:
    """The processes that share a study, as one of them.

    They are the trials of a study beside it. A storage numbers trials one at a time, and changes none
    that is finished; so whoever comes first of those that are not finished leads, and who has been
    taken for dead learns so from its own next sign of life. No clock is compared with another.

    Args:
        study: The study that is shared.
        threads: Calls that this process makes at a time.
        lease: Seconds without a sign of life after which a member is taken for dead.
    """

    def __init__(self, study: Study, threads: int, lease: float | None = None) -> None:
        self._storage = study._storage
        self._name = f"{study.study_name}:crew"
        self._threads = threads
        self._lease = LEASE if lease is None else lease
        self._seen: dict[int, _Seen] = {}
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self.members: list[Member] = []

    def join(self) -> None:
        """Takes a place behind those that are there.

        Raises:
            StorageError: The storage cannot be read and written.
        """
        with reported():
            crew = optuna.create_study(
                storage=self._storage, study_name=self._name, direction="maximize", load_if_exists=True
            )
            self._study_id = crew._study_id
            notes = {HOST: f"{socket.gethostname()}:{os.getpid()}", THREADS: self._threads, BEAT: 0}
            record = create_trial(state=TrialState.RUNNING, user_attrs=notes)
            self._trial_id = self._storage.create_new_trial(self._study_id, record)
            self.number = self._storage.get_trial(self._trial_id).number
            self._beaten, self._beats, self._gone = time.monotonic(), 0, threading.Event()
            started(partial(self._keep_beating, self._gone), "mpromptune-crew")
            self.look()

    @property
    def present(self) -> list[Member]:
        """Those who are there, in order, as of the last look."""
        return [member for member in self.members if member.is_present]

    @property
    def leader(self) -> Member:
        """The first of them."""
        return self.present[0]

    @property
    def me(self) -> Member:
        """This process as the others see it."""
        return self.members[self.number]

    @property
    def leads(self) -> bool:
        """Whether this process is the first."""
        return self.leader.number == self.number

    def look(self) -> None:
        """Sees who is there, and declares dead who has long given no sign of life.

        Raises:
            LeftOutError: This process has been.
        """
        with reported():
            trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        now = time.monotonic()
        # While this process is held up itself, it does not see the others live.
        passed, self._looked = min(now - self._looked, 5 * POLL), now
        self.members = [_member(trial) for trial in trials]
        if not self.me.is_present:
            self._gone.set()
            raise LeftOutError(
                f"The others took this coordinator for dead after {self._lease:g} s without a sign of life, "
                "and go on without it. The same call takes part again."
            )
        for member in self.present:
            if member.number != self.number and self._is_silent(member, passed):
                logger.warning("%s gives no sign of life any more; going on without it.", member.notes[HOST])
                self._bury(member)

    def _is_silent(self, member: Member, passed: float) -> bool:
        beat = member.notes.get(BEAT)
        seen = self._seen.get(member.number)
        if seen is None or seen.beat != beat:
            self._seen[member.number] = _Seen(beat)
            return False
        seen.silent += passed
        return seen.silent > self._lease

    def _bury(self, member: Member) -> None:
        with reported(), suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(member.trial_id, TrialState.FAIL)

    def note(self, key: str, value: Any) -> None:
        """Writes something down of this process."""
        self.write(self.me, key, value)

    def write(self, member: Member, key: str, value: Any) -> None:
        """Writes something down of a member; in vain if it has gone."""
        with reported(), suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(member.trial_id, key, value)

    def require_present(self) -> None:
        """Makes sure, before something decisive, that nobody else has taken over.

        Raises:
            LeftOutError: Somebody has.
        """
        if self._gone.is_set() or time.monotonic() - self._beaten > self._lease / 2:
            with reported():
                self._beat()
            self.look()

    def ended(self) -> dict[str, str]:
        """Why whoever led while this process was there has ended the search, if so."""
        known = [member for member in self.members if member.number in self._seen]
        return next((m.farewell for m in known if not m.is_present and m.farewell), {})

    def require_going(self) -> None:
        """Stops with whoever stopped the search.

        Raises:
            SearchStoppedError: Its reason.
        """
        farewell = self.ended()
        if farewell.get("why") == STOPPED:
            raise SearchStoppedError(f"The coordinator that led has stopped: {farewell['message']}")

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Leaves at the end, and says why where that concerns the others."""
        farewell = None
        try:
            yield
        except LeftOutError:
            raise
        except SearchStoppedError as error:
            if not isinstance(error.__cause__, LeftOutError):
                farewell = {"why": STOPPED, "message": str(error)}
            raise
        finally:
            self.leave(farewell)

    def leave(self, farewell: dict[str, str] | None = None) -> None:
        """Goes; whatever was not finished is the others'."""
        if self._gone.is_set():
            return
        self._gone.set()
        try:
            if farewell is not None:
                self.note(FAREWELL, farewell)
            self._bury(self.me)
        except Exception:  # noqa: BLE001 - whatever a storage raises
            logger.warning("The storage cannot be told that this coordinator leaves; the others will notice.")

    def _keep_beating(self, gone: threading.Event) -> None:
        while not gone.wait(self._lease / _BEATS):
            try:
                self._beat()
            except Exception as error:  # noqa: BLE001 - whatever a storage raises; the search will see it too
                logger.debug("No sign of life could be given: %s", error)

    def _beat(self) -> None:
        """A sign of life; where this process has been declared dead, it is in vain."""
        with self._lock:
            self._beats += 1
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(self._trial_id, BEAT, self._beats)
                self._beaten = time.monotonic()


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


def _member(trial: FrozenTrial) -> Member:
    return Member(trial.number, trial._trial_id, not trial.state.is_finished(), trial.user_attrs)
