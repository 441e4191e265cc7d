"""A journal file that outlives killed processes, power cuts and full disks.

Optuna's own refuses the whole file for one damaged line, or everything after it. Here a line that its replay
cannot read costs only what stood in it. The file, its format and the replay are Optuna's.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from mpromptune.errors import StorageError
from mpromptune.storage.damage import reported

logger = logging.getLogger(__name__)

# NOTE: seconds after which a lock belongs to a process that is dead; the least that Optuna takes without a
# warning. A write takes milliseconds; one that is slower than that still appends in one piece.
_GRACE = 3
_FIRST_BYTES = b'{"op_code":'
# A trial whose creation was lost. Its number is that of its line among the creations.
_CREATION = {"op_code": 4, "worker_id": "", "datetime_start": "2000-01-01T00:00:00"}


class TolerantJournal(JournalStorage):
    """Optuna's storage in a file, which goes on without the lines that it cannot read.

    Args:
        path: The file; created unless it exists.

    Raises:
        StorageError: It cannot be read and written, or is no journal.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._lost = 0  # lines, each of which may have created a trial
        super().__init__(_File(self._path))

    def _sync_with_backend(self) -> None:
        replay = self._replay_result
        for record in self._backend.read_logs(replay.log_number_read):
            line = replay.log_number_read + 1
            try:
                self._create_lost(record)
                replay.apply_logs([record])
            except StorageError:
                raise
            except Exception:  # whatever Optuna raises on what it has not written
                if isinstance(record, dict) and record.get("worker_id") == replay.worker_id:
                    raise  # of what was asked for just now
                self._lost += 1
                logger.warning("Line %d of %s is unreadable; skipped.", line, self._path)
            replay.log_number_read = line

    def _create_lost(self, record: dict[str, Any]) -> None:
        """Creates what a record mentions and an unreadable line has created.

        Trials are numbered as they are created: without, all later scores would be another trial's.
        """
        replay, study, trial = self._replay_result, record.get("study_id"), record.get("trial_id", -1)
        if self._lost and study == replay._next_study_id:
            raise StorageError(
                f"The line of {self._path} that created study {study} is unreadable, and the lines about it "
                "are of no use without. Mend the line, or give another path."
            )
        missing = trial + 1 - len(replay._trials)
        if missing > self._lost:
            raise ValueError(f"there is no trial {trial}")
        if missing > 0:
            last = replay._trial_id_to_study_id.get(len(replay._trials) - 1, replay._next_study_id - 1)
            replay.apply_logs([{**_CREATION, "study_id": last}] * missing)
            self._lost -= missing


class _File(JournalFileBackend):
    """Optuna's journal file: what is no JSON is read as None, and what fails is a `StorageError`."""

    def __init__(self, path: str) -> None:
        with reported(f"The journal {path} cannot be opened"):
            open(path, "ab").close()
            super().__init__(path, JournalFileOpenLock(path, grace_period=_GRACE))
            with self._locked():  # now, rather than after something has been paid for
                _require_journal(path)

    def read_logs(self, log_number_from: int) -> Generator[Any, None, None]:
        with reported(f"The journal {self._file_path} cannot be read"), open(self._file_path, "rb") as file:
            offset = file.seek(self._log_number_offset[log_number_from])
            for number, line in enumerate(file, log_number_from + 1):
                if not line.endswith(b"\n"):
                    return  # it is being written; or torn, and ended by the next one to be written
                offset += len(line)
                self._log_number_offset[number] = offset
                yield _parse(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes records, on a line of their own even if the last one was torn."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with (
            reported(f"The journal {self._file_path} cannot be written"),
            self._locked(),
            open(self._file_path, "ab+") as file,
        ):
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # it took so long that another process broke the lock
                self._lock.release()


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _require_journal(path: str) -> None:
    with open(path, "rb") as file:
        line = file.readline(200)
    start = line.rstrip(b"\n")[: len(_FIRST_BYTES)]
    if line and not (start and _FIRST_BYTES.startswith(start)):  # the first record may be torn
        hint = f"; for a database, give sqlite:///{path}" if start.startswith(b"SQLite") else ""
        raise StorageError(f"{path} is no journal of Optuna's{hint}. Nothing was written to it.")
