"""A journal file that survives killed processes, power failures and full disks.

Optuna's own storage rejects the whole file because of one damaged line, or everything after that line. Here
only the content of the damaged line is lost. The file, its format and the replay are Optuna's.
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

# NOTE: seconds after which the holder of a lock is considered dead; the smallest value that Optuna accepts
# without a warning. A write takes milliseconds; even a slower one is appended in one piece.
_GRACE = 3
_FIRST_BYTES = b'{"op_code":'
# The record of a trial whose creation was lost; trials are numbered in the order of their creation.
_CREATION = {"op_code": 4, "worker_id": "", "datetime_start": "2000-01-01T00:00:00"}


class TolerantJournal(JournalStorage):
    """Optuna's storage in a file; it skips lines that cannot be read.

    Args:
        path: The file; created if it does not exist.

    Raises:
        StorageError: The file cannot be read and written, or is not a journal.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._lost = 0  # unreadable lines, each of which may have created a trial
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
            except Exception:  # Optuna may raise any error on records that it has not written
                if isinstance(record, dict) and record.get("worker_id") == replay.worker_id:
                    raise  # the record is of this process, so the error is for its caller
                self._lost += 1
                logger.warning("Line %d of %s is unreadable; skipped.", line, self._path)
            replay.log_number_read = line

    def _create_lost(self, record: dict[str, Any]) -> None:
        """Create trials that a record mentions and an unreadable line has created.

        Trials are numbered as they are created, so without this all later scores would go to other trials.
        """
        replay, study, trial = self._replay_result, record.get("study_id"), record.get("trial_id", -1)
        if self._lost and study == replay._next_study_id:
            raise StorageError(
                f"The line of {self._path} that created study {study} is unreadable, and the lines about the "
                "study are useless without it. Repair the line, or pass another path."
            )
        missing = trial + 1 - len(replay._trials)
        if missing > self._lost:
            raise ValueError(f"there is no trial {trial}")
        if missing > 0:
            last = replay._trial_id_to_study_id.get(len(replay._trials) - 1, replay._next_study_id - 1)
            replay.apply_logs([{**_CREATION, "study_id": last}] * missing)
            self._lost -= missing


class _File(JournalFileBackend):
    """Optuna's journal file; lines that are not JSON are read as None, and errors are a `StorageError`."""

    def __init__(self, path: str) -> None:
        with reported(f"The journal {path} cannot be opened"):
            open(path, "ab").close()
            super().__init__(path, JournalFileOpenLock(path, grace_period=_GRACE))
            with self._locked():  # check now, before anything is paid for
                _require_journal(path)

    def read_logs(self, log_number_from: int) -> Generator[Any, None, None]:
        with reported(f"The journal {self._file_path} cannot be read"), open(self._file_path, "rb") as file:
            offset = file.seek(self._log_number_offset[log_number_from])
            for number, line in enumerate(file, log_number_from + 1):
                if not line.endswith(b"\n"):
                    return  # it is being written, or it is incomplete; the next write then ends it
                offset += len(line)
                self._log_number_offset[number] = offset
                yield _parse(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records, beginning a new line if the last line is incomplete."""
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
            with suppress(RuntimeError):  # another process has broken the lock because this took too long
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
    if line and not (start and _FIRST_BYTES.startswith(start)):  # the first record may be incomplete
        hint = f"; for a database, pass sqlite:///{path}" if start.startswith(b"SQLite") else ""
        raise StorageError(
            f"{path} is not an Optuna journal{hint}. Pass a path that is free. Nothing was written to it."
        )
