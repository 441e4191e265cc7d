"""The lease of a study: only one search or compile at a time writes to it.

This is own code because no library has a lease for every storage: file locks work on one host, advisory locks
in one database, and Optuna's heartbeats for trials in databases.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.study import Study

from mpromptune.errors import StudyInUseError
from mpromptune.execution.interrupts import deferred, is_over, pause
from mpromptune.storage.attributes import LEASE
from mpromptune.storage.damage import CRASHES, reported

logger = logging.getLogger(__name__)

# NOTE: seconds between renewals; each writes a row of a database or a line of a journal.
BEAT = 10.0
# NOTE: seconds without a renewal after which a run on another host counts as dead: six renewals, and as long
# as a run waits for a lost connection to its database (`storage.PATIENCE`).
SILENCE = 60.0
# NOTE: seconds between two checks of a lease whose holder may be dead.
_LOOK = 1.0
# NOTE: seconds between writing a lease and reading it back. Another run needs a few milliseconds between
# finding the study free and writing its own lease; a slower run is noticed at the next renewal.
_SETTLE = 0.1

# Tokens of the leases that this process holds.
_TOKENS: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """The run that has a lease, as saved in the storage.

    Attributes:
        host: Name of its host, for messages.
        machine: Identity of the host or container in which ``pid`` is unique.
        pid: Id of its process.
        began: Start time of that process in the units of its system; None if it is unknown.
        token: Random identity of the run.
        time: Time of the last renewal, by the clock of its host.
    """

    host: str
    machine: str
    pid: int
    began: str | None
    token: str
    time: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def lives(self) -> bool | None:
        """Whether the run is still alive; None if this cannot be determined from here."""
        if self.machine != _machine() or os.name != "posix":
            return None
        if self.pid == os.getpid():
            return self.token in _TOKENS
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # there is no such process, or the id is invalid
            return False
        except PermissionError:  # the process belongs to another user
            pass
        began = _began(self.pid)
        # Without its start time it could be another process with the same id.
        return None if None in (began, self.began) else began == self.began


class Lease:
    """The right of one run to write to a study (see `held`).

    Attributes:
        study: The study.
        lost: The error that says why the run may not write any more; None while it may.
    """

    def __init__(self, study: Study, stopped: threading.Event) -> None:
        self.study = study
        self.lost: StudyInUseError | None = None
        self._stopped = [stopped]
        self._over = threading.Event()
        pid = os.getpid()
        self._own = Holder(socket.gethostname(), _machine(), pid, _began(pid), secrets.token_hex(8), 0.0)

    def require(self) -> None:
        """Require that the run may still write.

        Raises:
            StudyInUseError: Another run has taken over the study.
        """
        if self.lost is not None:
            raise self.lost

    def _share(self, stopped: threading.Event) -> None:
        self._stopped.append(stopped)
        if self.lost is not None:
            stopped.set()

    def _lose(self, why: str) -> None:
        self.lost = StudyInUseError(
            f"This run must not write to the study {self.study.study_name!r} any more: {why}"
        )
        for event in self._stopped:
            event.set()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        renewing = threading.Thread(target=self._keep_renewing, name="mpromptune-lease", daemon=True)
        _TOKENS.add(self._own.token)
        try:
            while not self._is_own(self._read()):
                self._await_free()
                self._renew()
                pause(_SETTLE)  # if two runs start at the same moment, the last one to write has it
            renewing.start()
            yield
        finally:
            with deferred():
                self._release(renewing)

    def _release(self, renewing: threading.Thread) -> None:
        """Release the study; if the storage fails, the next run waits until the lease expires."""
        self._over.set()
        try:
            if renewing.ident is not None:
                renewing.join(timeout=BEAT)
            if self._own.time and self.lost is None and self._is_own(self._read()):
                self._write(None)
        except Exception as error:  # noqa: BLE001 - any error of a storage; it must not hide the run's end
            logger.warning("The lease of %r could not be released: %s", self.study.study_name, error)
        finally:
            _TOKENS.discard(self._own.token)

    def _keep_renewing(self) -> None:
        while not self._over.wait(BEAT) and self.lost is None:
            began = time.monotonic()
            try:
                holder = self._read()
                if holder is not None and not self._is_own(holder):
                    self._lose(f"{holder} has taken over the study")
                    return
                self._renew()
            except Exception as error:  # noqa: BLE001 - any error of a storage; the run meets it too
                logger.debug("The lease could not be renewed: %s", error)
            else:
                if time.monotonic() - began > SILENCE - BEAT:  # another run may have begun in between
                    self._lose("its lease could not be renewed in time")

    def _await_free(self) -> None:
        holder = self._read()
        if holder is None or (lives := holder.lives()) is False:
            return
        if lives:
            raise self._in_use(holder, time.time() - holder.time)
        logger.warning(
            "It is unknown whether %s is alive, which has not released the study %r. If it does not "
            "renew its lease within %g s, this run takes over the study.",
            *(holder, self.study.study_name, SILENCE),
        )
        # The clocks of different hosts are not compared: if the lease still changes, its holder is alive.
        for second in range(round(SILENCE / _LOOK)):
            pause(_LOOK)
            now = self._read()
            if now is None:
                return
            if now != holder or is_over() or any(event.is_set() for event in self._stopped):
                raise self._in_use(now, 0.0 if now != holder else (second + 1) * _LOOK)

    def _in_use(self, holder: Holder, seconds: float) -> StudyInUseError:
        return StudyInUseError(
            f"The study {self.study.study_name!r} is in use by {holder}, which last renewed its lease "
            f"{max(seconds, 0.0):.0f} s ago. One run at a time: wait for that run or end "
            "it, then make the same call again to continue; or pass another study_name or storage."
        )

    def _is_own(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._own.token

    def _read(self) -> Holder | None:
        # A system attribute, because user attributes contain all answers of LMs and are read as a whole.
        with reported():
            value: Any = self.study._storage.get_study_system_attrs(self.study._study_id).get(LEASE)
        try:
            holder = Holder(**value)
            return replace(holder, pid=int(holder.pid), time=float(holder.time))
        except CRASHES:  # there is no lease, or it is damaged
            return None

    def _renew(self) -> None:
        self._own = replace(self._own, time=time.time())
        self._write(asdict(self._own))

    def _write(self, value: dict[str, Any] | None) -> None:
        with reported():
            self.study._storage.set_study_system_attr(self.study._study_id, LEASE, value)


# The lease of this context: the search of a compile uses the lease of the compile.
_CURRENT: ContextVar[Lease | None] = ContextVar("mpromptune_lease", default=None)


@contextmanager
def held(study: Study, stopped: threading.Event) -> Iterator[Lease]:
    """Hold the lease of a study, renewed by a thread; for a study in memory nothing is written.

    Args:
        study: The study.
        stopped: Set when the lease is lost.

    Raises:
        StudyInUseError: Another run has the lease.
        StorageError: The storage cannot be read and written.
    """
    outer = _CURRENT.get()
    if outer is not None and (outer.study._storage, outer.study._study_id) == (
        study._storage,
        study._study_id,
    ):
        outer._share(stopped)
        yield outer
        return
    lease = Lease(study, stopped)
    if isinstance(study._storage, InMemoryStorage):
        yield lease
        return
    with lease._taken():
        token = _CURRENT.set(lease)
        try:
            yield lease
        finally:
            _CURRENT.reset(token)


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _began(pid: int) -> str | None:
    """Start time of a process; "" for one that has ended but is still listed; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
