"""A journal file that outlives killed processes, power cuts and full disks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from optuna.distributions import json_to_distribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from mpromptune.errors import StorageError

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# NOTE: seconds after which a lock belongs to a process that is dead; the least that Optuna takes without a
# warning. A write takes milliseconds; one that is slower than that still appends in one piece.
_GRACE = 3
_FIRST_BYTES = b'{"op_code":'
_CREATE_STUDY, _DELETE_STUDY, _CREATE_TRIAL, _SET_PARAM, _SET_STATE = 0, 1, 4, 5, 6
_TIMES = "datetime_start", "datetime_complete"
# What Optuna's replay reads of a record, by its code.
_STUDY, _TRIAL, _NUMBER = {"study_id": int}, {"trial_id": int}, (int, float)
_FIELDS: dict[int, dict[str, Any]] = {
    _CREATE_STUDY: {"study_name": str, "directions": list},
    _DELETE_STUDY: _STUDY,
    2: {**_STUDY, "user_attr": dict},
    3: {**_STUDY, "system_attr": dict},
    _CREATE_TRIAL: {**_STUDY, "datetime_start": (str, type(None))},
    _SET_PARAM: {**_TRIAL, "param_name": str, "param_value_internal": _NUMBER, "distribution": str},
    _SET_STATE: {**_TRIAL, "state": int, "values": (list, type(None))},
    7: {**_TRIAL, "step": int, "intermediate_value": _NUMBER},
    8: {**_TRIAL, "user_attr": dict},
    9: {**_TRIAL, "system_attr": dict},
}


class TolerantJournal(JournalFileBackend):
    """Optuna's journal file, in which an unreadable line costs only what stood in it.

    Optuna's own refuses the whole file for it, or the lines after it. Only JSON is read, and nothing
    of it is evaluated. The lock of a process that was killed is broken after some seconds.

    Args:
        path: The file; created unless it exists.

    Raises:
        StorageError: It cannot be read and written, or is no journal.
    """

    def __init__(self, path: str) -> None:
        path = os.path.abspath(path)
        with _reported(path, "opened"):
            open(path, "ab").close()
            super().__init__(path, JournalFileOpenLock(path, grace_period=_GRACE))
            with self._locked():  # now, rather than after something has been paid for
                _require_journal(path)
        self._first = 0  # the number of the first of
        self._records: list[Record] = []  # those which have been read, but not been asked for
        self._restart()

    def read_logs(self, log_number_from: int) -> Generator[Record, None, None]:
        """Readable records from the given one on; they alone are counted."""
        if log_number_from < self._first:
            self._restart()
        with _reported(self._file_path, "read"):
            self._read_on()
        del self._records[: log_number_from - self._first]
        self._first = log_number_from
        yield from list(self._records)

    def append_logs(self, logs: list[Record]) -> None:
        """Writes records, on a line of their own even if the last one was torn."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with (
            _reported(self._file_path, "written"),
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

    def _restart(self) -> None:
        self._first, self._records = 0, []
        self._offset = 0
        self._lines = 0
        self._replay = _Replay(self._file_path)

    def _read_on(self) -> None:
        with open(self._file_path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is being written; or torn, and ended by the next one to be written
                self._records.extend(self._readable(line))
                self._offset += len(line)
                self._lines += 1

    def _readable(self, line: bytes) -> list[Record]:
        record = _parse(line)
        records = self._replay.records(record) if record is not None else None
        if records is None:
            self._replay.skipped += 1
            logger.warning("Line %d of %s is unreadable; skipped.", self._lines + 1, self._file_path)
            return []
        return records


class _Replay:
    """As much of Optuna's replay as it takes to see that a record refers to something that was lost.

    Studies and trials are numbered as they are created. A trial whose creation is unreadable is
    created when it is first mentioned, or the scores of all later trials would be taken for another's.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.skipped = 0  # lines, of which each may have created something
        self._names: dict[int, str] = {}
        self._n_studies = 0
        self._n_trials = 0
        self._creation = {"op_code": _CREATE_TRIAL, "worker_id": "", "datetime_start": "2000-01-01T00:00:00"}

    def records(self, record: Record) -> list[Record] | None:
        """The record, after what has to come before it; None if it makes no sense."""
        if record["op_code"] == _CREATE_STUDY:
            self._create_study(record["study_name"])
        elif "study_id" in record:
            return [record] if self._is_of_study(record) else None
        elif record["trial_id"] >= self._n_trials:
            return self._create_trials(record["trial_id"] + 1 - self._n_trials, record)
        return [record]

    def _create_study(self, name: str) -> None:
        if name not in self._names.values():
            self._names[self._n_studies] = name
            self._n_studies += 1

    def _is_of_study(self, record: Record) -> bool:
        number = record["study_id"]
        if number == self._n_studies and self.skipped:
            raise StorageError(
                f"The line of {self._path} that created study {number} is unreadable, and the lines about it "
                "are of no use without. Mend the line, or give another path."
            )
        if record["op_code"] == _DELETE_STUDY:
            self._names.pop(number, None)
        elif record["op_code"] == _CREATE_TRIAL and number in self._names:
            self._n_trials += 1
            self._creation = {**self._creation, **{k: record[k] for k in ("study_id", "datetime_start")}}
        return bool(number < self._n_studies)

    def _create_trials(self, number: int, record: Record) -> list[Record] | None:
        if number > self.skipped or not self._n_studies:
            return None
        self.skipped -= number
        self._n_trials += number
        return [{"study_id": self._n_studies - 1, **self._creation}] * number + [record]


def _parse(line: bytes) -> Record | None:
    """A record with all that the replay reads of it, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("worker_id"), str):
        return None
    code = record.get("op_code")
    fields = _FIELDS.get(code) if isinstance(code, int) else None
    if fields is None or not all(isinstance(record.get(key), kind) for key, kind in fields.items()):
        return None
    return record if _is_replayable(record) else None


def _is_replayable(record: Record) -> bool:
    """Whether Optuna's replay takes every value of it."""
    try:
        _replay_values(record)
    except Exception:  # noqa: BLE001 - whatever Optuna raises on what it has not written
        return False
    return True


def _replay_values(record: Record) -> None:
    state = TrialState(record.get("state", TrialState.RUNNING))
    code = record["op_code"]
    times = [record[name] for name in _TIMES if record.get(name) is not None]
    if code == _SET_STATE and state != TrialState.WAITING:
        times.append(record["datetime_complete" if state.is_finished() else "datetime_start"])
    for time in times:
        datetime.fromisoformat(time)
    for direction in record.get("directions", []):
        StudyDirection(direction)
    for value in record.get("values") or []:
        float(value)
    for name in ("user_attr", "system_attr"):
        ((_, _),) = record.get(name, {"one": None}).items()
    if code == _SET_PARAM:
        json_to_distribution(record["distribution"]).to_external_repr(record["param_value_internal"])
    elif code == _CREATE_TRIAL:
        _replay_creation(record)


def _replay_creation(record: Record) -> None:
    distributions = {k: json_to_distribution(v) for k, v in record.get("distributions", {}).items()}
    params = record.get("params", {})
    create_trial(
        state=TrialState.WAITING,
        params={name: distributions[name].to_external_repr(value) for name, value in params.items()},
        distributions=distributions,
        user_attrs=dict(record.get("user_attrs", {})),
        system_attrs=dict(record.get("system_attrs", {})),
        intermediate_values={int(k): float(v) for k, v in record.get("intermediate_values", {}).items()},
    )


def _require_journal(path: str) -> None:
    with open(path, "rb") as file:
        line = file.readline(200)
    start = line.rstrip(b"\n")[: len(_FIRST_BYTES)]
    if line and not (start and _FIRST_BYTES.startswith(start)):  # the first record may be torn
        hint = f"; for a database, give sqlite:///{path}" if start.startswith(b"SQLite") else ""
        raise StorageError(f"{path} is no journal of Optuna's{hint}. Nothing was written to it.")


@contextmanager
def _reported(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"The journal {path} cannot be {what}: {reason}. What it holds is kept."
        ) from error
